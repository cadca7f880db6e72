// Builds the page into megaforge/dashboard/static, under names that stay, and notes there which sources it was built of.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import react from "@vitejs/plugin-react";
import { defineConfig, type Plugin } from "vite";

const SERVER = "http://127.0.0.1:8765"; // of `npm run dev`: a dashboard that runs
const OUT = join(import.meta.dirname, "../megaforge/dashboard/static");
const SOURCES = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts"];

const sha256 = (content: Buffer | string) => createHash("sha256").update(content).digest("hex");

function digests(folder: string, names: string[]): Record<string, string> {
  return Object.fromEntries(names.sort().map((name) => [name, sha256(readFileSync(join(folder, name)))]));
}

/** Writes BUILD.json: SHA-256 of each source and of each file built; tests/dashboard/test_static.py compares. */
function noteBuild(): Plugin {
  return {
    name: "note-build",
    apply: "build",
    closeBundle() {
      const sources = [...SOURCES, ...readdirSync(join(import.meta.dirname, "src")).map((name) => `src/${name}`)];
      const built = readdirSync(OUT).filter((name) => name !== "BUILD.json");
      const note = { sources: digests(import.meta.dirname, sources), built: digests(OUT, built) };
      writeFileSync(join(OUT, "BUILD.json"), JSON.stringify(note, null, 1) + "\n");
    },
  };
}

export default defineConfig({
  plugins: [react(), noteBuild()],
  base: "/",
  build: {
    outDir: OUT,
    emptyOutDir: true,
    assetsDir: "",
    assetsInlineLimit: 0,
    license: { fileName: "licenses.md" }, // of React and uPlot, which their copies must carry
    modulePreload: { polyfill: false },
    rollupOptions: { output: { entryFileNames: "app.js", assetFileNames: "app.[ext]" } },
  },
  server: { proxy: { "/api": SERVER, "/ws": { target: SERVER, ws: true } } },
});

// The curves of the chosen runs, in groups; what is drawn is asked for again as the runs go on.
import { useEffect, useMemo, useRef, useState } from "react";
import { fetchJson, query, type Curves, type RunRow } from "./api";
import { Chart, type Line } from "./Chart";
import { grouped } from "./chart_groups";

const REFRESH_MS = 1000;
const X_LABELS = { iteration: "step", tokens: "tokens", time: "hours of training" };
type X = keyof typeof X_LABELS;

/** The curves of `request`, asked for again when `stamp` changes, at most once a second and one at a time. */
function useCurves(request: string, stamp: string): { curves: Curves; problem: string } {
  const [curves, setCurves] = useState<Curves>({ curves: [], metrics: [] });
  const [problem, setProblem] = useState("");
  const asked = useRef({ request: "", at: 0, busy: false, again: false });
  const wanted = useRef(request);
  wanted.current = request;

  useEffect(() => {
    let timer = 0;
    const ask = async () => {
      const state = asked.current;
      if (state.busy) {
        state.again = true;
        return;
      }
      state.busy = true;
      do {
        state.again = false;
        const now = wanted.current;
        [state.request, state.at] = [now, Date.now()];
        try {
          const found = await fetchJson<Curves>(`/api/series?${now}`);
          if (now === wanted.current) setCurves(found);
          else state.again = true;
          setProblem("");
        } catch (error) {
          setProblem(String((error as Error).message));
        }
      } while (state.again);
      state.busy = false;
    };
    const wait = request === asked.current.request ? REFRESH_MS - (Date.now() - asked.current.at) : 0;
    timer = window.setTimeout(ask, Math.max(0, wait));
    return () => window.clearTimeout(timer);
  }, [request, stamp]);
  return { curves, problem };
}

interface GroupProps {
  title: string;
  metrics: string[];
  opened: boolean;
  settings: { x: X; smooth: number; log: boolean; range: [number, number] | null };
  chosen: Map<string, string>;
  stamp: string;
  dark: boolean;
  onMetrics: (names: string[]) => void;
  onZoom: (range: [number, number] | null) => void;
}

function Group({ title, metrics, opened, settings, chosen, stamp, dark, onMetrics, onZoom }: GroupProps) {
  const [open, setOpen] = useState(opened);
  return (
    <details open={open} onToggle={(event) => setOpen(event.currentTarget.open)} data-group={title}>
      <summary>
        {title} <span className="quiet">{metrics.length}</span>
      </summary>
      {open && <Drawn {...{ metrics, settings, chosen, stamp, dark, onMetrics, onZoom }} />}
    </details>
  );
}

const MOST = 60; // charts of a group; more would make the page slow

function Drawn({ metrics: all, settings, chosen, stamp, dark, onMetrics, onZoom }: Omit<GroupProps, "title" | "opened">) {
  const { x, smooth, log, range } = settings;
  const metrics = useMemo(() => all.slice(0, MOST), [all]);
  const names = metrics.includes("loss") ? [...metrics, "valid/loss"] : metrics;
  const request = query({
    run: [...chosen.keys()],
    metric: names,
    x,
    smooth: smooth > 0 ? smooth : undefined,
    low: range?.[0],
    high: range?.[1],
  });
  const { curves, problem } = useCurves(request, stamp);
  const known = curves.metrics.join("\n");
  useEffect(() => {
    if (known) onMetrics(known.split("\n"));
  }, [known, onMetrics]);

  const lines = useMemo(() => {
    const found = new Map<string, Line[]>(metrics.map((name) => [name, []]));
    for (const curve of curves.curves) {
      const color = chosen.get(curve.run);
      const validation = curve.metric === "valid/loss" && metrics.includes("loss");
      const lines = found.get(validation ? "loss" : curve.metric);
      if (!lines || !color || (curve.x.length === 0 && !range)) continue; // where one looks closer there may be none
      const raw = smooth > 0 && !curve.smoothed && !curve.metric.startsWith("valid/");
      if (raw && chosen.size > 3) continue; // many faint lines hide the others
      const label = validation ? `${curve.run}: validation` : raw ? `${curve.run}: each` : curve.run;
      lines.push({ label, color, curve, faint: raw, points: curve.metric.startsWith("valid/") });
    }
    return found;
  }, [curves, chosen, metrics, smooth, range]);

  return (
    <>
      {problem && <p className="problem">Curves: {problem}</p>}
      {all.length > MOST && <p className="quiet">the first {MOST} of {all.length}</p>}
      <div className="charts">
        {[...lines].map(([name, own]) =>
          own.length === 0 ? null : (
            <Chart key={name} title={name} lines={own} log={log && name !== "lr_boost"} xLabel={X_LABELS[x]} dark={dark} onZoom={onZoom} />
          ),
        )}
      </div>
    </>
  );
}

const FIRST = ["loss", "lr", "tokens_per_second", "grad_norm"];

export function Charts({ chosen, rows, dark }: { chosen: Map<string, string>; rows: Map<string, RunRow>; dark: boolean }) {
  const [x, setX] = useState<X>("iteration");
  const [smooth, setSmooth] = useState(0);
  const [log, setLog] = useState(false);
  const [range, setRange] = useState<[number, number] | null>(null);
  const [metrics, setMetrics] = useState<string[]>(FIRST);
  const groups = useMemo(() => grouped(metrics), [metrics]);
  const settings = useMemo(() => ({ x, smooth, log, range }), [x, smooth, log, range]);
  const stamp = [...chosen.keys()].map((name) => `${rows.get(name)?.version}:${rows.get(name)?.points}`).join(" ");
  if (chosen.size === 0) return <p className="quiet">Tick runs in the list to draw and compare them.</p>;
  return (
    <section aria-label="Curves">
      <div className="bar">
        <h2>Curves</h2>
        <label>
          Over{" "}
          <select
            value={x}
            onChange={(event) => {
              setX(event.target.value as X);
              setRange(null);
            }}
          >
            <option value="iteration">steps</option>
            <option value="tokens">tokens</option>
            <option value="time">time</option>
          </select>
        </label>
        <label>
          Smoothing <output>{smooth}</output>
          <input type="range" min={0} max={0.99} step={0.01} value={smooth} onChange={(event) => setSmooth(Number(event.target.value))} />
        </label>
        <label>
          <input type="checkbox" checked={log} onChange={(event) => setLog(event.target.checked)} /> logarithmic
        </label>
        {range ? (
          <button onClick={() => setRange(null)}>Whole range</button>
        ) : (
          <span className="quiet narrow-hidden">drag over a chart to look closer</span>
        )}
      </div>
      {groups.map((group) => (
        <Group
          key={group.title}
          title={group.title}
          opened={group.open}
          metrics={group.metrics}
          settings={settings}
          chosen={chosen}
          stamp={stamp}
          dark={dark}
          onMetrics={setMetrics}
          onZoom={setRange}
        />
      ))}
    </section>
  );
}

import { useCallback, useEffect, useMemo, useState } from "react";
import type { RunRow, State } from "./api";
import { Charts } from "./Charts";
import { ControlPanel } from "./Control";
import { useView, type Transport } from "./feed";
import { Alerts, Progresses, Resources, useDark } from "./Overview";
import { RunPanel } from "./RunPanel";
import { RunsTable } from "./RunsTable";

// Told apart in both themes and by most eyes; Okabe and Ito's colours, darkened where white paper asks for it.
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a63d2", "#7f7f7f", "#a0522d", "#2f4f9f"];

const SAYS: Record<Transport, string> = {
  connecting: "connecting",
  socket: "live",
  polling: "live, by polling",
  offline: "the server does not answer",
  refused: "not signed in",
};

/** The runs that the address names, so that a view can be kept and sent. */
function useAddress(): [string[], (names: string[]) => void] {
  const read = () => new URLSearchParams(location.hash.slice(1)).getAll("run");
  const [names, setNames] = useState(read);
  useEffect(() => {
    const changed = () => setNames(read());
    window.addEventListener("hashchange", changed);
    return () => window.removeEventListener("hashchange", changed);
  }, []);
  const set = useCallback((chosen: string[]) => {
    history.replaceState(null, "", `#${new URLSearchParams(chosen.map((name) => ["run", name]))}`);
    setNames(chosen);
  }, []);
  return [names, set];
}

/** Whether it is a model of a fleet that runs, and the page may stop it. */
function stoppable(state: State, row: RunRow): boolean {
  const inFleet = Object.values(state.fleets).some((fleet) => fleet.alive && fleet.runs.includes(row.name));
  return state.control && inFleet && row.status === "running";
}

export function App() {
  const { state, runs, transport, problem } = useView();
  const [dark, toggleDark] = useDark();
  const [names, setNames] = useAddress();
  const [open, setOpen] = useState<string | null>(null);

  const first = runs.keys().next().value;
  const drawn = names.length === 0 && runs.size === 1 && first !== undefined ? [first] : names;
  const present = drawn.filter((name) => runs.has(name)).slice(0, COLORS.length);
  const key = present.join("\n");
  const colors = useMemo(() => new Map(key ? key.split("\n").map((name, index) => [name, COLORS[index]!]) : []), [key]);
  const choose = useCallback(
    (name: string) => setNames(key.split("\n").includes(name) ? key.split("\n").filter((one) => one !== name) : [...key.split("\n").filter(Boolean), name]),
    [key, setNames],
  );
  const show = useCallback((name: string) => setOpen((now) => (now === name ? null : name)), []);
  const row = open === null ? undefined : runs.get(open);
  const live = transport === "socket" || transport === "polling";

  return (
    <main data-transport={transport} data-sequence={state?.sequence ?? 0} data-epoch={state?.epoch}>
      <header className="bar">
        <h1>MegaForge</h1>
        <span className="quiet narrow-hidden">{state?.directory}</span>
        <span className={live ? "good" : "bad"} role="status">
          {SAYS[transport]}
          {problem && `: ${problem}`}
        </span>
        <button onClick={toggleDark} aria-pressed={dark}>
          {dark ? "Light" : "Dark"}
        </button>
      </header>
      {transport === "refused" && <p className="problem">Open the address that tools/dashboard.py printed: it holds the token.</p>}
      {state && (
        <>
          <div className="cards">
            <Progresses state={state} />
            <Resources machine={state.machine} />
            <Alerts alerts={state.alerts} show={show} />
            {state.control && <ControlPanel fleets={state.fleets} />}
          </div>
          <RunsTable rows={runs} colors={colors} open={open} choose={choose} show={show} />
          {drawn.length > COLORS.length && <p className="quiet">the first {COLORS.length} of the ticked runs are drawn</p>}
          {row && <RunPanel row={row} stoppable={stoppable(state, row)} close={() => setOpen(null)} />}
          {open !== null && !row && <p className="problem">{open}: this run's files are gone</p>}
          <Charts chosen={colors} rows={runs} dark={dark} />
        </>
      )}
    </main>
  );
}

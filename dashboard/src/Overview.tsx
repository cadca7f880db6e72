// What holds for all runs: overall progress with the time left, the machine, alerts.
import { useEffect, useRef, useState } from "react";
import { fetchJson, query } from "./api";
import type { Alert, FleetState, Machine, Overall, State } from "./api";
import { bytes, clock, seconds, share } from "./format";
import { Bar } from "./RunsTable";

const fleet = ({ alive, mode, workers, reason }: FleetState) =>
  `${mode}, ${alive ? `${workers ?? "?"} at once${reason ? ` (${reason})` : ""}` : "not running"}`;

const HISTORY_MS = 10000;

/** Overall progress over time, from 0 to 1, as the events of the runs told it: the same after a restart of the server. */
function History({ fleet, share }: { fleet?: string; share: number | null }) {
  const [found, setFound] = useState<{ time: number[]; share: number[] }>({ time: [], share: [] });
  const asked = useRef(0);
  useEffect(() => {
    if (Date.now() - asked.current < HISTORY_MS) return;
    asked.current = Date.now();
    fetchJson<typeof found>(`/api/history?${query({ fleet })}`).then(setFound, () => undefined); // the next look asks again
  }, [fleet, share]);
  const { time } = found;
  if (time.length < 2) return null;
  const [first, last] = [time[0]!, time.at(-1)!];
  const points = time.map((now, index) => `${(100 * (now - first)) / (last - first || 1)},${24 * (1 - found.share[index]!)}`);
  const label = `progress from ${clock(first)} to ${clock(last)}`;
  return (
    <svg className="history" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label={label} data-history={fleet ?? "all"}>
      <polyline points={points.join(" ")} />
    </svg>
  );
}

function Progress({ name, overall, of, note }: { name: string; overall: Overall; of?: string; note?: string }) {
  return (
    <div className="overall" data-overall={name}>
      <div>
        <strong>{name}</strong> <span className="quiet">{overall.line}</span>
      </div>
      <Bar value={overall.share} label={`overall progress of ${name}`} />
      <History fleet={of} share={overall.share} />
      <div className="quiet">
        {overall.completed} of {overall.models} complete, {overall.running} running
        {overall.stopped > 0 && `, ${overall.stopped} stopped`}
        {overall.failed > 0 && <strong className="bad">, {overall.failed} failed</strong>}
        {overall.running > 0 && overall.eta_seconds !== null && `, ${seconds(overall.eta_seconds)} left`}
        {note && <div>{note}</div>}
      </div>
    </div>
  );
}

export function Progresses({ state }: { state: State }) {
  return (
    <section aria-label="Progress" className="card">
      <h2>Progress</h2>
      <Progress name="all runs" overall={state.overall} />
      {Object.entries(state.fleets).map(([name, overall]) => (
        <Progress key={name} name={`fleet ${name}`} of={name} overall={overall} note={fleet(overall)} />
      ))}
    </section>
  );
}

function Gauge({ title, used, total, text }: { title: string; used: number | null; total: number | null; text: string }) {
  const value = used !== null && total ? used / total : null;
  return (
    <div className="gauge" data-gauge={title}>
      <span>{title}</span>
      <meter min={0} max={1} high={0.9} optimum={0} value={value ?? 0} aria-label={title} />
      <span className={value !== null && value > 0.9 ? "bad" : "quiet"}>{text}</span>
    </div>
  );
}

export function Resources({ machine }: { machine: Machine | null }) {
  if (machine === null) return null;
  const of = (used: number | null, total: number | null) => `${bytes(used)} of ${bytes(total)}`;
  return (
    <section aria-label="Resources" className="card">
      <h2>
        Resources <span className="quiet">{machine.host}</span>
      </h2>
      <Gauge title="CPU" used={machine.cpu_share} total={1} text={`${share(machine.cpu_share)} of ${machine.cpus} cores`} />
      <Gauge title="Memory" used={machine.memory_bytes} total={machine.memory_total_bytes} text={of(machine.memory_bytes, machine.memory_total_bytes)} />
      <Gauge title="Disk" used={machine.disk_bytes} total={machine.disk_total_bytes} text={of(machine.disk_bytes, machine.disk_total_bytes)} />
      {machine.gpus.map((gpu, index) => (
        <div key={index}>
          <Gauge title={`GPU ${index}`} used={gpu.used_share} total={1} text={`${share(gpu.used_share)} of ${gpu.name}`} />
          <Gauge title={`GPU ${index} memory`} used={gpu.memory_bytes} total={gpu.memory_total_bytes} text={of(gpu.memory_bytes, gpu.memory_total_bytes)} />
        </div>
      ))}
      {machine.gpus.length === 0 && <p className="quiet">no GPU</p>}
    </section>
  );
}

export function Alerts({ alerts, show }: { alerts: Alert[]; show: (name: string) => void }) {
  return (
    <section aria-label="Alerts" className="card" aria-live="polite">
      <h2>Alerts</h2>
      {alerts.length === 0 && <p className="quiet">none</p>}
      <ul className="plain">
        {alerts.map((alert, index) => (
          <li key={index} className={alert.state === "resolved" ? "quiet" : "bad"} data-alert={alert.alert} data-state={alert.state}>
            <button className="link" onClick={() => show(alert.run)}>
              {alert.run}
            </button>{" "}
            <strong>{alert.alert}</strong> {alert.state}: {alert.text} <span className="quiet">{clock(alert.time)}</span>
          </li>
        ))}
      </ul>
    </section>
  );
}

/** Whether the page is dark: as the system has it until the user says. */
export function useDark(): [boolean, () => void] {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const [dark, setDark] = useState(() => (localStorage.getItem("dark") ?? String(system.matches)) === "true");
  useEffect(() => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  }, [dark]);
  return [
    dark,
    () => {
      localStorage.setItem("dark", String(!dark));
      setDark(!dark);
    },
  ];
}

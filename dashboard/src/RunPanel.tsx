// One run: what it said at its start, its checkpoints, its audit trail, compliance, samples and events.
import { useEffect, useState } from "react";
import { fetchJson, query, type Audit, type RunDetail, type RunRow } from "./api";
import { CompliancePanel } from "./Compliance";
import { StopModel } from "./Control";
import { bytes, clock, seconds, share } from "./format";
import { Bar } from "./RunsTable";

const TABS = ["Checkpoints", "Audit and compliance", "Samples", "Events"] as const;

function Checkpoints({ detail }: { detail: RunDetail }) {
  if (detail.checkpoints.length === 0) return <p className="quiet">no checkpoint yet</p>;
  return (
    <table data-table="checkpoints">
      <thead>
        <tr>
          <th>Checkpoint</th>
          <th className="number">Step</th>
          <th className="number">Size</th>
          <th className="narrow-hidden">Saved</th>
          <th className="narrow-hidden">SHA-256 of its sums</th>
        </tr>
      </thead>
      <tbody>
        {detail.checkpoints.map((one) => (
          <tr key={one.name}>
            <th scope="row">{one.name}</th>
            <td className="number">{one.iteration}</td>
            <td className="number">{bytes(one.bytes)}</td>
            <td className="narrow-hidden">{clock(one.time)}</td>
            <td className="narrow-hidden">
              <code>{one.sums?.slice(0, 16) ?? "–"}</code>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function Trail({ run }: { run: string }) {
  const [audit, setAudit] = useState<Audit | null>(null);
  const [busy, setBusy] = useState(false);
  const verify = async () => {
    setBusy(true);
    const found = await fetchJson<Audit>(`/api/audit?${query({ run })}`).catch((error) => ({ state: "broken" as const, message: String(error.message) }));
    setAudit(found);
    setBusy(false);
  };
  useEffect(() => setAudit(null), [run]);
  return (
    <div>
      <button onClick={verify} disabled={busy}>
        Verify the audit trail
      </button>{" "}
      {audit && (
        <span className={audit.state === "broken" ? "bad" : audit.state === "holds" ? "good" : "quiet"} role="status" data-audit={audit.state}>
          {audit.message}
        </span>
      )}
    </div>
  );
}

function Fields({ of }: { of: Record<string, unknown> }) {
  const text = (value: unknown): string =>
    typeof value === "object" && value !== null ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value);
  return (
    <dl>
      {Object.entries(of).map(([name, value]) => (
        <div key={name}>
          <dt>{name.replaceAll("_", " ")}</dt>
          <dd>{text(value)}</dd>
        </div>
      ))}
    </dl>
  );
}

function EventList({ events }: { events: RunDetail["events"] }) {
  return (
    <ol className="plain events">
      {events.map((event, index) => {
        const { time, kind, iteration, uptime: _, ...rest } = event;
        return (
          <li key={index}>
            <span className="quiet">{clock(Number(time))}</span> <strong>{String(kind)}</strong> at step {String(iteration)}{" "}
            <code>{Object.keys(rest).length ? JSON.stringify(rest) : ""}</code>
          </li>
        );
      })}
    </ol>
  );
}

function Samples({ samples }: { samples: RunDetail["samples"] }) {
  if (samples.length === 0)
    return <p className="quiet">none: train with --generate-prompts TEXT, or append what tools/generate.py --load RUN --prompt TEXT --json writes to RUN/samples.jsonl</p>;
  return (
    <ol className="plain">
      {samples.map((sample, index) => (
        <li key={index}>
          {sample.iteration !== null && <span className="quiet">step {sample.iteration} </span>}
          <pre>
            <strong>{sample.prompt}</strong>
            {sample.text}
          </pre>
        </li>
      ))}
    </ol>
  );
}

export function RunPanel({ row, stoppable, close }: { row: RunRow; stoppable: boolean; close: () => void }) {
  const [detail, setDetail] = useState<RunDetail | null>(null);
  const [problem, setProblem] = useState("");
  const [tab, setTab] = useState<(typeof TABS)[number]>("Checkpoints");
  useEffect(() => {
    let left = false;
    fetchJson<RunDetail>(`/api/run?${query({ run: row.name })}`)
      .then((found) => !left && (setDetail(found), setProblem("")))
      .catch((error) => !left && setProblem(String(error.message)));
    return () => {
      left = true;
    };
  }, [row.name, row.last_event_time, row.status]);
  const own = detail?.name === row.name ? detail : null;
  return (
    <section aria-label={`Run ${row.name}`} className="card wide" data-detail={row.name}>
      <div className="bar">
        <h2>{row.name}</h2>
        <span className={`status ${row.status}`}>{row.status}</span>
        {stoppable && <StopModel run={row.name} />}
        <button onClick={close}>Close</button>
      </div>
      <Bar value={row.share} label={`progress of ${row.name}`} />
      <p>
        {share(row.share)}, step {row.iteration}
        {row.train_iters !== null && ` of ${row.train_iters}`}
        {row.seconds_per_step !== null && `, ${row.seconds_per_step.toPrecision(3)} s a step`}
        {row.eta_seconds !== null && `, ${seconds(row.eta_seconds)} left`}
        {row.reason && <span className="quiet"> ({row.reason})</span>}
      </p>
      {problem && <p className="problem">{problem}</p>}
      {own && (
        <>
          <Fields of={own.start} />
          <div role="tablist" className="bar">
            {TABS.map((name) => (
              <button key={name} role="tab" aria-selected={tab === name} onClick={() => setTab(name)}>
                {name}
              </button>
            ))}
          </div>
          <div role="tabpanel" aria-label={tab}>
            {tab === "Checkpoints" && <Checkpoints detail={own} />}
            {tab === "Samples" && <Samples samples={own.samples} />}
            {tab === "Events" && <EventList events={own.events} />}
            {tab === "Audit and compliance" && (
              <>
                <Trail run={row.name} />
                <CompliancePanel report={own.compliance} />
              </>
            )}
          </div>
        </>
      )}
    </section>
  );
}

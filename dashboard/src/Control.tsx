// With --control: starts the fleets that the command line named, and stops them.
import { useEffect, useState } from "react";
import { fetchJson, query, type FleetState } from "./api";

interface Offer {
  name: string;
  file: string;
  models: string[];
  mode: string;
  workers: number;
}

interface Offers {
  fleets: Offer[];
  modes: string[];
  most_workers: number;
  suggestion: { training_mode_suggestion: string; max_workers: number };
}

interface Verdict {
  workers: number;
  reason: string;
  warning: boolean;
}

const post = (path: string, body: unknown) =>
  fetchJson(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** What the server says of a choice, asked for again as it changes and as the machine does. */
function useVerdict(fleet: string, mode: string, workers: number): Verdict | null {
  const [verdict, setVerdict] = useState<Verdict | null>(null);
  useEffect(() => {
    let left = false;
    const ask = () =>
      fetchJson<Verdict>(`/api/control/check?${query({ fleet, mode, workers })}`)
        .then((found) => !left && setVerdict(found))
        .catch((error) => !left && setVerdict({ workers: 1, reason: String(error.message), warning: true }));
    const first = window.setTimeout(ask, 150);
    const again = window.setInterval(ask, 5000);
    return () => {
      left = true;
      window.clearTimeout(first);
      window.clearInterval(again);
    };
  }, [fleet, mode, workers]);
  return verdict;
}

export function StopModel({ run }: { run: string }) {
  const [said, setSaid] = useState("");
  const stop = () =>
    post("/api/control/stop_model", { run })
      .then(() => setSaid("it saves and ends"))
      .catch((error) => setSaid(String(error.message)));
  return (
    <>
      <button onClick={stop}>Stop this model</button> <span role="status">{said}</span>
    </>
  );
}

function Form({ offers, fleets }: { offers: Offers; fleets: Record<string, FleetState> }) {
  const first = offers.fleets[0]!;
  const [name, setName] = useState(first.name);
  const offer = offers.fleets.find((one) => one.name === name) ?? first;
  const [mode, setMode] = useState(first.mode);
  const [workers, setWorkers] = useState(first.workers);
  const [busy, setBusy] = useState(false);
  const [said, setSaid] = useState<{ text: string; bad: boolean }>({ text: "", bad: false });
  const verdict = useVerdict(name, mode, workers);
  const running = fleets[name]?.alive ?? false;

  const send = async (path: string, body: unknown, done: string) => {
    setBusy(true);
    setSaid({ text: "", bad: false });
    try {
      await post(path, body);
      setSaid({ text: done, bad: false });
    } catch (error) {
      setSaid({ text: String((error as Error).message), bad: true });
    }
    setBusy(false);
  };

  return (
    <form
      className="control"
      onSubmit={(event) => {
        event.preventDefault();
        void send("/api/control/start", { fleet: name, mode, workers }, `${name} has started`);
      }}
    >
      <label>
        Fleet{" "}
        <select value={name} onChange={(event) => setName(event.target.value)}>
          {offers.fleets.map((one) => (
            <option key={one.name}>{one.name}</option>
          ))}
        </select>{" "}
        <span className="quiet">
          {offer.models.length} models: {offer.models.slice(0, 6).join(", ")}
          {offer.models.length > 6 && " …"}
        </span>
      </label>
      <fieldset>
        <legend>Training mode</legend>
        {offers.modes.map((one) => (
          <label key={one}>
            <input type="radio" name="mode" value={one} checked={mode === one} onChange={() => setMode(one)} /> {one}
            {one === offers.suggestion.training_mode_suggestion && <span className="quiet"> (suggested here)</span>}
          </label>
        ))}
      </fieldset>
      <label>
        Workers <output>{workers}</output>{" "}
        <input
          type="range"
          name="workers"
          aria-label="Workers"
          min={1}
          max={offers.most_workers}
          value={workers}
          disabled={mode === "series"}
          onChange={(event) => setWorkers(Number(event.target.value))}
        />
      </label>
      <p className={verdict?.warning ? "bad" : "quiet"} role="status" data-verdict={verdict?.warning ? "warning" : "fits"}>
        {verdict && (verdict.warning ? `${verdict.reason}. ${verdict.workers} will run at once.` : verdict.reason)}
      </p>
      <div className="bar">
        <button type="submit" disabled={busy || running}>
          Start
        </button>
        <button type="button" disabled={busy || !running} onClick={() => send("/api/control/stop", { fleet: name }, `${name}: its models save and end`)}>
          Stop
        </button>
        <span className={said.bad ? "problem" : "good"} role="status" data-said>
          {said.text}
        </span>
      </div>
    </form>
  );
}

export function ControlPanel({ fleets }: { fleets: Record<string, FleetState> }) {
  const [offers, setOffers] = useState<Offers | null>(null);
  const [problem, setProblem] = useState("");
  useEffect(() => {
    fetchJson<Offers>("/api/control").then(setOffers, (error) => setProblem(String(error.message)));
  }, []);
  return (
    <section aria-label="Control" className="card">
      <h2>Train a fleet</h2>
      {problem && <p className="problem">{problem}</p>}
      {offers && <Form offers={offers} fleets={fleets} />}
    </section>
  );
}

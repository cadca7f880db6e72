// What the server says: megaforge/dashboard/feed.py makes the state, series.py the curves, panels.py the rest.

export type Status = "waiting" | "running" | "completed" | "stopped" | "failed" | "lost" | "silent";

export interface RunRow {
  name: string;
  sequence: number;
  status: Status;
  reason: string;
  iteration: number;
  train_iters: number | null;
  share: number | null;
  seconds_per_step: number | null;
  eta_seconds: number | null;
  last_event_time: number | null;
  points: number; // records of steps and evaluations so far
  version: number; // rises when they were written anew
  last: Record<string, number | null>;
  alerts: number;
}

export interface Overall {
  models: number;
  completed: number;
  stopped: number; // when they were asked to; they can go on
  failed: number;
  running: number;
  share: number | null;
  eta_seconds: number | null;
  line: string;
}

export interface FleetState extends Overall {
  alive: boolean; // its supervisor runs on the dashboard's machine
  runs: string[];
  mode: string;
  workers: number | null; // models at once now, and why
  reason: string;
}

export interface Compliance {
  problem?: string;
  made: string;
  score: number | null;
  level: string | null;
  asked: string | null;
  passed: boolean;
  lacking: string[];
  parts: { title: string; share: number | null }[];
}

export interface Gpu {
  name: string;
  used_share: number | null;
  memory_bytes: number | null;
  memory_total_bytes: number | null;
}

export interface Machine {
  host: string;
  cpus: number;
  cpu_share: number | null;
  memory_bytes: number | null;
  memory_total_bytes: number | null;
  disk_bytes: number | null;
  disk_total_bytes: number | null;
  gpus: Gpu[];
  time: number;
}

export interface Alert {
  run: string;
  alert: string;
  state: string;
  severity: string;
  text: string;
  time: number;
}

export interface State {
  epoch: string;
  since: number;
  sequence: number;
  full: boolean;
  time: number;
  directory: string;
  control: boolean;
  runs: RunRow[];
  removed: string[];
  overall: Overall;
  fleets: Record<string, FleetState>;
  machine: Machine | null;
  alerts: Alert[];
}

export interface Curve {
  run: string;
  metric: string;
  x: number[];
  y: (number | null)[];
  count: number; // points that these stand for
  smoothed: boolean;
}

export interface Curves {
  curves: Curve[];
  metrics: string[]; // all that these runs have
}

export interface Checkpoint {
  name: string;
  iteration: number;
  time: number;
  bytes: number | null;
  sums: string | null;
}

export interface Sample {
  iteration: number | null;
  prompt: string;
  text: string;
}

export interface RunDetail {
  name: string;
  start: Record<string, unknown>;
  events: Record<string, unknown>[];
  checkpoints: Checkpoint[];
  samples: Sample[];
  compliance: Compliance | null;
}

export interface Audit {
  state: "absent" | "holds" | "broken";
  message: string;
}

export class ServerError extends Error {
  constructor(
    public status: number,
    message: string,
  ) {
    super(message);
  }
}

export async function fetchJson<T>(path: string, options: RequestInit = {}): Promise<T> {
  const answer = await fetch(path, { credentials: "same-origin", ...options });
  const body = await answer.json().catch(() => ({ error: answer.statusText }));
  if (!answer.ok) throw new ServerError(answer.status, String(body.error ?? answer.statusText));
  return body as T;
}

export function query(values: Record<string, string | number | string[] | undefined>): string {
  const found = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (Array.isArray(value)) value.forEach((one) => found.append(name, one));
    else if (value !== undefined) found.set(name, String(value));
  }
  return found.toString();
}

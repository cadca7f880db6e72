// The state of the server, kept up to date: over a WebSocket, and by polling while there is none. Both ask for what
// came after the sequence number that the page has, so that nothing is lost or told twice when one takes over.
import { useSyncExternalStore } from "react";
import { fetchJson, query, ServerError, type RunRow, type State } from "./api";

export type Transport = "connecting" | "socket" | "polling" | "offline" | "refused";

export interface View {
  state: State | null; // the last message; its `runs` are the rows of that message alone
  runs: Map<string, RunRow>;
  transport: Transport;
  problem: string;
}

const POLL_MS = 1000;
const SLOWEST_RETRY_MS = 15000;

class Feed {
  private view: View = { state: null, runs: new Map(), transport: "connecting", problem: "" };
  private listeners = new Set<() => void>();
  private polling: number | undefined;
  private retryMs = 500;

  subscribe = (listener: () => void) => {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  };

  current = () => this.view;

  start() {
    this.open();
  }

  private since() {
    const { state } = this.view;
    return state ? { since: state.sequence, epoch: state.epoch } : { since: 0 };
  }

  private set(change: Partial<View>) {
    this.view = { ...this.view, ...change };
    this.listeners.forEach((listener) => listener());
  }

  private open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/ws?${query(this.since())}`);
    socket.onopen = () => {
      this.retryMs = 500;
      window.clearTimeout(this.polling);
      this.polling = undefined;
      this.set({ transport: "socket", problem: "" });
    };
    socket.onmessage = (event) => this.take(JSON.parse(event.data) as State);
    socket.onclose = () => {
      if (this.view.transport === "refused") return;
      if (this.polling === undefined) this.poll();
      window.setTimeout(() => this.open(), this.retryMs);
      this.retryMs = Math.min(2 * this.retryMs, SLOWEST_RETRY_MS);
    };
  }

  private poll = async () => {
    this.polling = window.setTimeout(this.poll, POLL_MS);
    try {
      const state = await fetchJson<State>(`/api/state?${query(this.since())}`);
      this.take(state);
      if (this.polling !== undefined) this.set({ transport: "polling", problem: "" });
    } catch (error) {
      if (this.polling === undefined) return;
      const refused = error instanceof ServerError && error.status === 401;
      if (refused) window.clearTimeout(this.polling);
      this.set({ transport: refused ? "refused" : "offline", problem: String((error as Error).message) });
    }
  };

  private take(message: State) {
    const { state } = this.view;
    const same = state !== null && state.epoch === message.epoch;
    if (same && message.sequence <= state.sequence) return; // the other way has told it already
    if (!message.full && (!same || message.since > state.sequence)) return; // does not follow: the next poll asks again
    const runs = message.full ? new Map<string, RunRow>() : new Map(this.view.runs);
    message.removed.forEach((name) => runs.delete(name));
    message.runs.forEach((row) => runs.set(row.name, row));
    this.set({ state: message, runs });
  }
}

export const feed = new Feed();

export const useView = () => useSyncExternalStore(feed.subscribe, feed.current);

// The list of runs. Only the rows in sight are in the page, so that a thousand runs cost as little as ten.
import { memo, useMemo, useRef, useState } from "react";
import type { RunRow } from "./api";
import { clock, seconds, share, short } from "./format";

const ROW = 36; // pixels; style.css has the same
const IN_SIGHT = 12;
const BESIDE = 8;

interface Column {
  title: string;
  key: (row: RunRow) => string | number | null;
  show: (row: RunRow) => string;
  wide?: boolean;
}

const COLUMNS: Column[] = [
  { title: "Step", key: (row) => row.iteration, show: (row) => steps(row) },
  { title: "Loss", key: (row) => row.last.loss ?? null, show: (row) => short(row.last.loss) },
  { title: "Tokens/s", key: (row) => row.last.tokens_per_second ?? null, show: (row) => short(row.last.tokens_per_second), wide: true },
  { title: "Left", key: (row) => row.eta_seconds, show: (row) => seconds(row.eta_seconds), wide: true },
  { title: "Last word", key: (row) => row.last_event_time, show: (row) => (row.last_event_time ? clock(row.last_event_time) : "–"), wide: true },
];

const steps = (row: RunRow) => (row.train_iters ? `${row.iteration}/${row.train_iters}` : String(row.iteration));

export function Bar({ value, label }: { value: number | null; label: string }) {
  return <progress max={1} value={value ?? 0} aria-label={label} title={`${label}: ${share(value)}`} />;
}

interface RowProps {
  row: RunRow;
  color: string | undefined;
  open: boolean;
  choose: (name: string) => void;
  show: (name: string) => void;
}

const Row = memo(function Row({ row, color, open, choose, show }: RowProps) {
  return (
    <tr data-run={row.name} className={open ? "open" : undefined}>
      <td>
        <input
          type="checkbox"
          checked={color !== undefined}
          onChange={() => choose(row.name)}
          style={{ accentColor: color }}
          aria-label={`draw ${row.name}`}
        />
      </td>
      <th scope="row">
        <button className="link" onClick={() => show(row.name)} aria-expanded={open} title={row.name}>
          {color && <span className="dot" style={{ background: color }} />}
          {row.name}
        </button>
      </th>
      <td>
        <span className={`status ${row.status}`} title={row.reason}>
          {row.status}
        </span>
        {row.alerts > 0 && <span className="count" title={`${row.alerts} alerts`}>{row.alerts}</span>}
      </td>
      <td className="narrow-hidden">
        <Bar value={row.share} label={`progress of ${row.name}`} />
      </td>
      {COLUMNS.map((column) => (
        <td key={column.title} className={column.wide ? "number narrow-hidden" : "number"}>
          {column.show(row)}
        </td>
      ))}
    </tr>
  );
});

interface Props {
  rows: Map<string, RunRow>;
  colors: Map<string, string>;
  open: string | null;
  choose: (name: string) => void;
  show: (name: string) => void;
}

export function RunsTable({ rows, colors, open, choose, show }: Props) {
  const [filter, setFilter] = useState("");
  const [order, setOrder] = useState<{ title: string; down: boolean }>({ title: "Run", down: false });
  const [first, setFirst] = useState(0);
  const place = useRef<HTMLDivElement>(null);

  const sorted = useMemo(() => {
    const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = (text: string) => words.every((word) => text.includes(word));
    const kept = [...rows.values()].filter((row) => wanted(`${row.name} ${row.status}`.toLowerCase()));
    const column = COLUMNS.find(({ title }) => title === order.title);
    const key = column?.key ?? (order.title === "Status" ? (row: RunRow) => row.status : (row: RunRow) => row.name);
    kept.sort((one, other) => compare(key(one), key(other)) || compare(one.name, other.name));
    return order.down ? kept.reverse() : kept;
  }, [rows, filter, order]);

  const top = Math.min(Math.max(0, first - BESIDE), Math.max(0, sorted.length - IN_SIGHT));
  const shown = sorted.slice(top, top + IN_SIGHT + 2 * BESIDE);
  const head = (title: string, className?: string) => (
    <th key={title} className={className} aria-sort={order.title !== title ? "none" : order.down ? "descending" : "ascending"}>
      <button className="link" onClick={() => setOrder({ title, down: order.title === title && !order.down })}>
        {title}
      </button>
    </th>
  );
  return (
    <section aria-label="Runs">
      <div className="bar">
        <h2>Runs</h2>
        <label>
          Filter <input type="search" value={filter} onChange={(event) => setFilter(event.target.value)} placeholder="name or status" />
        </label>
        <span className="quiet" data-count={sorted.length}>
          {sorted.length === rows.size ? `${rows.size} runs` : `${sorted.length} of ${rows.size} runs`}
        </span>
      </div>
      <div
        className="scroll"
        ref={place}
        tabIndex={0}
        role="region"
        aria-label="List of runs"
        onScroll={() => setFirst(Math.floor((place.current?.scrollTop ?? 0) / ROW))}
      >
        <table aria-rowcount={sorted.length}>
          <thead>
            <tr>
              <th aria-label="Drawn" />
              {head("Run")}
              {head("Status")}
              <th className="narrow-hidden">Progress</th>
              {COLUMNS.map((column) => head(column.title, column.wide ? "number narrow-hidden" : "number"))}
            </tr>
          </thead>
          <tbody>
            {top > 0 && <tr style={{ height: top * ROW }} aria-hidden />}
            {shown.map((row) => (
              <Row key={row.name} row={row} color={colors.get(row.name)} open={open === row.name} choose={choose} show={show} />
            ))}
            {top + shown.length < sorted.length && <tr style={{ height: (sorted.length - top - shown.length) * ROW }} aria-hidden />}
          </tbody>
        </table>
        {rows.size === 0 && <p className="quiet">No run yet. A run with --save DIR below this folder appears here by itself.</p>}
      </div>
    </section>
  );
}

// One for all: `localeCompare` with options makes one at each call, which is most of the time that a thousand runs take.
const COLLATOR = new Intl.Collator("en", { numeric: true });

function compare(one: string | number | null, other: string | number | null): number {
  if (one === other) return 0;
  if (one === null) return 1;
  if (other === null) return -1;
  return typeof one === "string" ? COLLATOR.compare(one, String(other)) : one - Number(other);
}

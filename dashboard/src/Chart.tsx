// One uPlot chart: curves of several runs, each with places of its own, joined on their union.
import { useEffect, useRef } from "react";
import uPlot from "uplot";
import type { Curve } from "./api";
import { notAnyMore, soon } from "./frames";

export interface Line {
  label: string;
  color: string;
  curve: Curve;
  faint?: boolean;
  points?: boolean;
}

interface Options {
  title: string;
  lines: Line[];
  log: boolean;
  xLabel: string;
  dark: boolean;
  onZoom: (range: [number, number] | null) => void;
}

const HEIGHT = 230;

function options({ lines, log, xLabel, dark, onZoom }: Options, width: number): uPlot.Options {
  const axis = { stroke: dark ? "#c4c9d4" : "#3a4150", grid: { stroke: dark ? "#ffffff18" : "#00000014" } };
  return {
    width,
    height: HEIGHT,
    scales: { x: { time: false }, y: { distr: log ? 3 : 1 } },
    axes: [
      { ...axis, label: xLabel, labelSize: 18, values: (_, ticks) => ticks.map(tick) },
      { ...axis, size: 62, values: (_, ticks) => ticks.map((value) => (value === null ? "" : tick(value))) },
    ],
    series: [
      { label: xLabel },
      ...lines.map((line) => ({
        label: line.label,
        stroke: line.faint ? `${line.color}55` : line.color,
        width: line.faint ? 1 : 1.6,
        spanGaps: true,
        points: { show: line.points ?? line.curve.x.length < 3, size: 6 },
      })),
    ],
    cursor: { drag: { x: true, y: false, setScale: false } },
    legend: { live: true },
    hooks: {
      ready: [(plot) => plot.over.addEventListener("dblclick", () => onZoom(null))],
      setSelect: [
        (plot) => {
          if (plot.select.width < 4) return;
          const [from, to] = [plot.select.left, plot.select.left + plot.select.width];
          onZoom([plot.posToVal(from, "x"), plot.posToVal(to, "x")]);
          plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
    },
  };
}

function tick(value: number): string {
  const size = Math.abs(value);
  if (size >= 1e9) return `${value / 1e9}G`;
  if (size >= 1e6) return `${value / 1e6}M`;
  if (size >= 1e4) return `${value / 1e3}k`;
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(6)));
}

function joined(lines: Line[], log: boolean): uPlot.AlignedData {
  const tables = lines.map(({ curve }) => {
    // A logarithmic axis has no place for what is not positive.
    const y = log ? curve.y.map((value) => (value !== null && value > 0 ? value : null)) : curve.y;
    return [curve.x, y] as uPlot.AlignedData;
  });
  return tables.length === 0 ? [[]] : tables.length === 1 ? tables[0]! : uPlot.join(tables);
}

interface Drawn {
  plot: uPlot;
  shape: string;
}

/** uPlot is made anew when what its options say changes; new points alone are only handed over. */
function shapeOf({ lines, log, xLabel, dark }: Options): string {
  return JSON.stringify([log, xLabel, dark, lines.map((line) => [line.label, line.color, line.points])]);
}

function redrawn(old: Drawn | null, given: Options, element: HTMLElement, width: number): Drawn {
  const shape = shapeOf(given);
  const data = joined(given.lines, given.log);
  if (old?.shape === shape) {
    if (old.plot.width !== width) old.plot.setSize({ width, height: HEIGHT });
    old.plot.setData(data);
    return old;
  }
  old?.plot.destroy();
  return { plot: new uPlot(options(given, width), data, element), shape };
}

export function Chart(given: Options) {
  const place = useRef<HTMLDivElement>(null);
  const newestGiven = useRef(given);
  newestGiven.current = given;
  const { title, lines, log, xLabel, dark } = given;
  const redraw = useRef(() => {});

  useEffect(() => {
    const element = place.current!;
    let drawn: Drawn | null = null;
    let width = 0; // as the observer says it: to ask the element would lay out the page again for each chart
    const onZoom = (range: [number, number] | null) => newestGiven.current.onZoom(range);
    redraw.current = () => {
      if (width > 0) soon(element, () => (drawn = redrawn(drawn, { ...newestGiven.current, onZoom }, element, width)));
    };
    const watch = new ResizeObserver(([entry]) => {
      width = Math.floor(entry!.contentRect.width);
      redraw.current();
    });
    watch.observe(element);
    return () => {
      watch.disconnect();
      notAnyMore(element);
      drawn?.plot.destroy();
    };
  }, []);

  useEffect(() => redraw.current(), [lines, log, xLabel, dark]);

  const newest = lines
    .filter((line) => !line.faint)
    .map((line) => `${line.label}: ${line.curve.y.at(-1) ?? "no value"}`)
    .join("; ");
  return (
    <figure className="chart" data-metric={title}>
      <figcaption>{title}</figcaption>
      <div ref={place} role="img" aria-label={`${title} over ${xLabel}. Last values: ${newest || "none"}`} />
    </figure>
  );
}

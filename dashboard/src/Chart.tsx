// One uPlot chart: curves of several runs, each with places of its own, joined on their union.
import { useEffect, useRef } from "react";
import uPlot from "uplot";
import type { Curve } from "./api";

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

export function Chart(given: Options) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const zoom = useRef(given.onZoom);
  zoom.current = given.onZoom;
  const { title, lines, log, xLabel, dark } = given;
  // uPlot is made anew when what its options say changes; new points alone are only handed over.
  const shape = JSON.stringify([log, xLabel, dark, lines.map((line) => [line.label, line.color, line.points])]);

  useEffect(() => {
    const element = place.current!;
    const made = new uPlot(
      options({ ...given, onZoom: (range) => zoom.current(range) }, element.clientWidth),
      joined(lines, log),
      element,
    );
    plot.current = made;
    const reset = () => zoom.current(null);
    made.over.addEventListener("dblclick", reset);
    const watch = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    watch.observe(element);
    return () => {
      watch.disconnect();
      made.destroy();
      plot.current = null;
    };
    // eslint-disable-next-line react-hooks/exhaustive-deps
  }, [shape]);

  useEffect(() => plot.current?.setData(joined(lines, log)), [lines, log, shape]);

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

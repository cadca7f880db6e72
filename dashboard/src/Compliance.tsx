// What tools/compliance_report.py found of a run: megaforge/compliance/report.py writes it.
import type { Compliance } from "./api";

const shown = (value: number | null) => (value === null ? "not measured" : value.toFixed(3));

export function CompliancePanel({ report }: { report: Compliance | null }) {
  if (report === null) return <p className="quiet">no compliance report: python tools/compliance_report.py RUN writes one</p>;
  if (report.problem) return <p className="problem">{report.problem}</p>;
  return (
    <div data-compliance={report.passed ? "passed" : "lacking"}>
      <p>
        Compliance score <strong>{shown(report.score)}</strong>, level {report.level ?? "none"}; asked: {report.asked ?? "–"}{" "}
        <span className={report.passed ? "good" : "bad"}>{report.passed ? "passed" : "not passed"}</span>{" "}
        <span className="quiet">{report.made}</span>
      </p>
      {report.lacking.length > 0 && (
        <ul>
          {report.lacking.map((line) => (
            <li key={line} className="bad">
              {line}
            </li>
          ))}
        </ul>
      )}
      <ul className="plain">
        {report.parts.map((part) => (
          <li key={part.title} className="gauge part">
            <span>{part.title}</span>
            <meter min={0} max={1} low={0.9} optimum={1} value={part.share ?? 0} aria-label={part.title} />
            <span className="quiet">{shown(part.share)}</span>
          </li>
        ))}
      </ul>
    </div>
  );
}

"""The report as one page of HTML without scripts or links to others."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid #8884 }
td.n { text-align: right; font-variant-numeric: tabular-nums } .bad { color: #c0392b } .good { color: #1e8449 }
code { font-size: .9em } summary { cursor: pointer }
"""


def page(report: Mapping[str, Any]) -> str:
    """HTML of what :meth:`megaforge.compliance.report.Report.as_json` gives."""
    verdict = "passed" if report["passed"] else "not passed"
    asked = report["asked"]
    lacking = "".join(f"<li>{_text(one)}</li>" for one in report["lacking"])
    commit = report["code"].get("commit") or "unknown"
    whose = f", run <code>{_text(report['run'])}</code>" if report["run"] else ""
    parts = [
        f"<h1>Compliance: {report['score']:.4f}, level {report['level'] or 'none'}</h1>",
        f"<p>{_text(report['title'])}</p>",
        f"<p>Asked: level {_text(asked['level'])}, score {asked['score']:g}: "
        f"<b class={'good' if report['passed'] else 'bad'}>{verdict}</b>. Made {_text(report['made'])} of commit "
        f"<code>{_text(commit)}</code>{whose}.</p>",
        f"<h2>Lacking</h2><ul>{lacking or '<li>nothing</li>'}</ul>",
        "<h2>Rules</h2>" + _rules(report["rules"]),
        "<h2>Gates</h2>" + "".join(_findings(one["name"], one["findings"]) for one in report["gates"]),
    ]
    if report["controls"]:
        parts.append("<h2>The run</h2>" + _controls(report["controls"]))
    parts.append("<h2>Waivers</h2>" + _findings("comments that silence a tool", report["waivers"]))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Compliance report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _rules(rules: Sequence[Mapping[str, Any]]) -> str:
    rows = ["<tr><th>rule</th><th>measured here</th><th>share</th><th>of</th><th>weight</th></tr>"]
    for rule in rules:
        share = "not measured" if rule["share"] is None else f"{rule['share']:.3f}"
        of = f"{rule['compliant']:,} of {rule['applicable']:,} {_text(rule['units'])}" if rule["applicable"] else ""
        rows.append(
            f"<tr><td>{rule['number']}. {_text(rule['title'])}</td><td>{_text(rule['adapted'])}<br>"
            f"<small>{_text(rule['note'])}</small></td><td class=n>{share}</td><td>{of}</td>"
            f"<td class=n>{rule['weight']}</td></tr>"
        )
    found = "".join(_findings(f"rule {rule['number']}", rule["findings"]) for rule in rules if rule["findings"])
    return f"<table>{''.join(rows)}</table>{found}"


def _controls(controls: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{_text(control['title'])}</td><td class={'good' if check['holds'] else 'bad'}>"
        f"{'yes' if check['holds'] else 'no'}</td><td>{_text(check['text'])}</td></tr>"
        for control in controls
        for check in control["checks"]
    ]
    return f"<table>{''.join(rows)}</table>"


def _findings(title: str, findings: Sequence[Mapping[str, str]]) -> str:
    items = "".join(f"<li><code>{_text(one['place'])}</code> {_text(one['text'])}</li>" for one in findings)
    return f"<details><summary>{_text(title)}: {len(findings)}</summary><ul>{items}</ul></details>"


def _text(value: object) -> str:
    return html.escape(str(value))

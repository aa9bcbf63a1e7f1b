"""Results of made-up runs as measuring would leave them, but without a record."""

import json

from srmu.evals.results import RESULTS, attack_rows, load_results, metric_rows, row_key


def write_rows(folder, rows, **facts):
    """Add rows and facts to a folder's results."""
    known = load_results(folder)
    merged = {row_key(row): row for row in (*known["rows"], *rows)}
    ordered = [merged[key] for key in sorted(merged)]
    (folder / RESULTS).write_text(json.dumps(known | facts | {"rows": ordered}))


def write_metrics(folder, **metrics):
    """Metrics by name, before and after."""
    for when, of_it in metrics.items():
        write_rows(folder, metric_rows(of_it, when))


def write_report(folder, report):
    """A report of attacks."""
    rows, left = attack_rows(report)
    write_rows(folder, rows, attacks=left)


def keep_rows(folder, is_kept):
    """Take the other rows out; without any under attack the attacks go, too."""
    results = load_results(folder)
    results["rows"] = [row for row in results["rows"] if is_kept(row)]
    if not any(row.get("attack") for row in results["rows"]):
        results.pop("attacks", None)
    (folder / RESULTS).write_text(json.dumps(results))

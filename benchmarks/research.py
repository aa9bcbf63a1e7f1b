"""Put tables of `srmu reproduce robust` or `ablations` into docs/research.md.

    srmu reproduce robust --out OUT --world closed --show
    python benchmarks/research.py OUT/robust.md closed

What stands between `<!-- closed -->` and `<!-- /closed -->` is replaced by the file; the page has
the marks closed, open and ablations. The file's pictures are copied beside the page.
"""

import re
import sys
from pathlib import Path
from shutil import copyfile

from srmu.engine.files import write_whole

PAGE = Path(__file__).parents[1] / "docs" / "research.md"


def filled(page: str, name: str, text: str) -> str:
    """The page with the marked part replaced; its headings go one level down."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the page has no {start} ... {end}")
    lower = re.sub(r"^##", "###", text.strip(), flags=re.MULTILINE)
    return f"{before}{start}\n\n{lower}\n\n{end}{after}"


def main(table: Path, mark: str) -> None:
    text = table.read_text()
    write_whole(PAGE, filled(PAGE.read_text(), mark, text))
    for picture in re.findall(r"\]\(([\w-]+\.svg)\)", text):
        copyfile(table.parent / picture, PAGE.parent / picture)
    print(f"{PAGE}: {mark}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

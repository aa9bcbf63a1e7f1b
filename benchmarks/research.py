"""Put the tables of `srmu reproduce robust` and `ablations` into docs/research.md.

    python benchmarks/research.py OUT

OUT is the folder of the reproduction. What stands between `<!-- robust -->` and `<!-- /robust -->`
is replaced by OUT/robust.md, likewise the ablations; their pictures are copied beside the page.
"""

import re
import sys
from pathlib import Path
from shutil import copyfile

from srmu.files import write_whole

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


def main(out: Path, page: Path = PAGE) -> None:
    for name in ("robust", "ablations"):
        if not (out / f"{name}.md").exists():
            print(f"{out} has no {name}.md: srmu reproduce {name} --out {out}")
            continue
        text = (out / f"{name}.md").read_text()
        write_whole(page, filled(page.read_text(), name, text))
        for picture in re.findall(r"\]\(([\w-]+\.svg)\)", text):
            copyfile(out / picture, page.parent / picture)
        print(f"{page}: {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

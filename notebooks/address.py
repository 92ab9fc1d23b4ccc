"""Writes the address of the repository, `url` in setup.cfg, into the notebooks and README.md: `make address`."""
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write(root: Path = ROOT) -> list[Path]:
    """Replaces the address in the notebooks and README.md; returns the files that changed.

    The badge "Open in Colab" of a notebook contains the address that is replaced.

    Raises:
      SystemExit: if `url` is not https://github.com/OWNER/NAME; Colab opens notebooks from GitHub only.
    """
    settings = configparser.ConfigParser()
    settings.read(root / "setup.cfg")
    url = settings["metadata"]["url"]
    new = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", url)
    if not new:
        raise SystemExit(f"setup.cfg: url = {url} must be https://github.com/OWNER/NAME: Colab opens notebooks from GitHub")
    notebooks, changed = sorted((root / "notebooks").glob("*.ipynb")), []
    old = re.search(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/", notebooks[0].read_text())[1]
    for path in [*notebooks, root / "README.md"]:
        text = path.read_text()
        replaced = re.sub(rf"(github(?:\.com)?/){re.escape(old)}(?![\w.-]*\w)", rf"\g<1>{new[1]}", text)
        if replaced != text:
            path.write_text(replaced)
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write():
        print(path.relative_to(ROOT))

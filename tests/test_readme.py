"""The README's example runs, and the files it names exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    """With the smaller of two networks that differ in their number of blocks."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    lines = [line for line in code.splitlines() if line]
    assert lines[0].startswith("import") and len(lines) == 1 + 5
    assert code.count('"resnet20"') == 1
    code = code.replace('"resnet20"', '"resnet8"')
    exec(compile(code, "README.md", "exec"), {})
    assert "(8, 10)" in capsys.readouterr().out


def test_linked_and_named_files_exist():
    named = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"configs/\w+\.py", README
    )
    named = [n for n in named if not n.startswith("http")]
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []


def test_every_public_name_in_the_tables_exists():
    import compressjax as cj

    for dotted in re.findall(r"\bcj\.([\w.]+)", README):
        thing = cj
        for part in dotted.rstrip(".").split("."):
            thing = getattr(thing, part)

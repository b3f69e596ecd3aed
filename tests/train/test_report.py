"""The report: what it measures, what it divides by what, and a page without assets."""

import html
import html.parser
import json
import re

import jax
import numpy as np
import pytest

import compressjax as cj
from tests.train import tiny
from train import config as configs
from train import page, report


def cell(plain, tuned, plain_float, tuned_float, batch=8):
    found = {"batch": batch}
    for name, value in (
        ("plain", plain),
        ("tuned", tuned),
        ("plain_float", plain_float),
        ("tuned_float", tuned_float),
    ):
        found[name] = value and {"median": value, "least": value}
    return found


def test_speedups_name_their_float():
    # Float: 8 ms as XLA runs it, 4 ms tuned. The small one: 2 ms, and 1 ms tuned.
    stage = {"name": "small", "latency": [cell(2e-3, 1e-3, 8e-3, 4e-3)]}
    as_is, tuned = report.variants(stage)
    assert (as_is["name"], tuned["name"]) == ("small", "small, tuned")
    assert as_is["cells"] == [
        {"batch": 8, "seconds": 2e-3, "plain float": 4.0, "tuned float": 2.0}
    ]
    assert tuned["cells"][0]["plain float"] == 8.0
    assert tuned["cells"][0]["tuned float"] == 4.0
    assert report.fastest(stage) == tuned["cells"]


def test_a_quantized_model_has_one_row_and_no_guess():
    stage = {"name": "int8", "latency": [cell(2e-3, None, 8e-3, None)]}
    (only,) = report.variants(stage)
    assert only["cells"][0]["plain float"] == 4.0
    assert only["cells"][0]["tuned float"] is None


def test_timings_are_of_all_in_turn():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = report.timings(calls, rounds=3)
    assert set(found) == {"a", "b"}
    assert 0 < found["a"]["least"] <= found["a"]["median"] < report.MIN_SECONDS
    runs = re.sub(r"(.)\1+", r"\1", "".join(order))  # aaabbb -> ab
    assert len(runs) >= 5  # never all of one, then all of the other


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The report of two stages that were not trained: float, and int8."""
    root = tmp_path_factory.mktemp("report")
    config = tiny.get_config()
    config.stages = [
        configs.Stage("float", optimizer=tiny.adam, epochs=1),
        configs.Stage("int8"),
        configs.Stage("integer"),
    ]
    config.report = configs.Report(batches=(2,), rounds=2)
    shape = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    model = tiny.build(config, jax.random.key(0), shape)
    pictures = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    quantized = cj.quantize.ptq([(pictures,)])(model)
    packed = cj.deploy.integer(tune=False)(quantized)
    rows = [
        {"stage": name, "epoch": e, "step": s, "total_step": s}
        | {"test_accuracy": a, "test_loss": 1.0}
        | ({"train_accuracy": a, "train_loss": 1.0} if e else {})
        for name, e, s, a in [
            ("float", 0, 0, 0.1),
            ("float", 1, 22, 0.9),
            ("int8", 0, 22, 0.7),
            ("int8", 1, 44, 0.8),
            ("integer", 0, 22, 0.8),
        ]
    ]
    said = []
    models = [model, quantized, packed]
    report.write(config, root, models, rows, said.append)
    assert str(root / "report.html") in said[-1]
    return root


def test_numbers_in_the_json(found):
    stages = json.loads((found / "report.json").read_text())["stages"]
    floating, int8, integer = stages
    # Conv 9*8, batch norm 16, dense 4*4*8*10 + 10; strides 2 of 8x8 give 4x4.
    assert floating["params"] == 72 + 16 + 1280 + 10
    assert floating["macs"] == 16 * 72 + 1280
    assert floating["bops"] == floating["macs"] * 32 * 32
    assert int8["bops"] == int8["macs"] * 8 * 8
    assert floating["accuracy"] == 0.9
    # Before its transform, after it, and at the end of the stage.
    before = [
        (s["accuracy_of_stage_before"], s["accuracy_before_training"], s["accuracy"])
        for s in stages
    ]
    assert before == [(None, 0.1, 0.9), (0.9, 0.7, 0.8), (0.8, 0.8, 0.8)]
    assert integer["weight_bytes"] < floating["weight_bytes"]
    # Fake-quantized weights count at 8 bits, and are floats in the saved files.
    assert int8["weight_bytes"] < floating["weight_bytes"] / 2
    assert [s["simulated"] for s in stages] == [False, True, False]
    saved = found / "models" / "02-integer"
    files = [f for f in saved.rglob("*") if f.is_file()]
    assert integer["disk_bytes"] == sum(f.stat().st_size for f in files) > 0
    for stage in stages:
        (row,) = stage["latency"]
        assert row["batch"] == 2 and row["plain"]["median"] > 0
        assert (row["tuned"] is None) == (stage["name"] != "float")
        assert row["plain_float"] == floating["latency"][0]["plain"]
        assert row["tuned_float"] == floating["latency"][0]["tuned"]


class Page(html.parser.HTMLParser):
    """Tags, and everything that would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.fetched.append(value)


def test_the_page_needs_nothing_else(found):
    text = (found / "report.html").read_text()
    reader = Page()
    reader.feed(text)
    assert reader.tags.count("svg") == 6
    assert reader.fetched == [] and "@import" not in text
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "int8" in text and "90.00 %" in text
    # Text and lines of the plots take their colours from the page: light and dark.
    assert page.INK not in text and page.GRID not in text
    assert "prefers-color-scheme: dark" in text


def test_bytes_are_named(found, capsys):
    data = json.loads((found / "report.json").read_text())
    report.show(data)
    shown = " ".join(capsys.readouterr().out.split())
    text = " ".join(html.unescape((found / "report.html").read_text()).split())
    for where in (shown, text):
        assert "weights at their bits" in where and "saved files" in where
        assert '"weights at their bits": the numbers of the network alone' in where
        assert '"int8": quantization is simulated; the weights are still float' in where
        assert "int8*" in where
        size = report.amount(data["stages"][1]["disk_bytes"], "B")
        assert f"{size}*" in where
    # The first thing the page says of bytes names the ratio, and the other one too.
    first, _, last = data["stages"]
    card = text[text.index("Weights at their bits") :][:300]
    assert f"{first['weight_bytes'] / last['weight_bytes']:.1f}x smaller" in card
    assert f"saved files: {first['disk_bytes'] / last['disk_bytes']:.1f}x" in card


def test_dots_of_the_accuracy_plot_are_explained(found):
    data = json.loads((found / "report.json").read_text())
    assert "at the end of the stage" in page.accuracy(data)
    assert "before it trained" not in page.accuracy(data)  # one stage trained: no dot
    data["stages"][1]["epochs"] = 1
    assert "before it trained" in page.accuracy(data)


def test_a_name_cannot_break_the_page(found):
    data = json.loads((found / "report.json").read_text())
    for rows in (data["stages"], data["metrics"]):
        for row in rows:
            for key in ("name", "stage"):
                if row.get(key) == "int8":
                    row[key] = "<script>x</script>"
    reader = Page()
    reader.feed(page.render(data))
    assert "script" not in reader.tags


def test_layer_names():
    assert page.layer_name("params/stage1/conv1/kernel") == "stage1/conv1"
    assert page.layer_name("integer/head/kernel#2") == "head/kernel#2"

"""Checkpoints know whether they are whole, and say which are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressjax as cj
from train import checkpoints
from train import mesh as meshes

Place = checkpoints.Place


def state(value):
    return {
        "w": jnp.full((2, 3), value, jnp.float32),
        "half": jnp.full((2,), value, jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "on": jnp.array([True, False]),
        "key": jax.random.key(int(value), impl="rbg"),
    }


@pytest.fixture
def said():
    return []


@pytest.fixture
def saved(tmp_path, said):
    return checkpoints.Checkpoints(tmp_path, [4, 2], keep=2, say=said.append)


def test_round_trip_keeps_values_types_and_notes(saved):
    saved.save(Place(0, 2), state(1.5), {"sizes": {"a": 3}})
    found = saved.restore(Place(0, 2), state(0.0))
    for name, leaf in state(1.5).items():
        assert found[name].dtype == leaf.dtype
        if name == "key":
            assert jax.random.key_impl(found[name]) == "rbg"
            found[name], leaf = map(jax.random.key_data, (found[name], leaf))
        np.testing.assert_array_equal(found[name], leaf)
    assert saved.notes(Place(0, 2)) == {"sizes": {"a": 3}}


def test_keys_of_random_streams_go_to_the_mesh_and_back():
    mesh = meshes.make()
    state = {"key": jax.random.split(jax.random.key(3), 2), "count": jnp.zeros(2)}
    there = meshes.put(state, meshes.state_shardings(state, mesh, fsdp=True))
    assert len(there["key"].sharding.device_set) == mesh.size == 2
    back = meshes.get(there)
    np.testing.assert_array_equal(
        jax.random.uniform(back["key"][1], 3), jax.random.uniform(state["key"][1], 3)
    )


def test_only_the_last_two_of_each_stage_are_kept(saved):
    for place in (Place(0, 0), Place(0, 2), Place(0, 4), Place(1, 0)):
        saved.save(place, state(0.0), {})
    names = sorted(path.name for path in saved.root.iterdir())
    assert names == ["00-00000002", "00-00000004", "01-00000000"]
    assert saved.latest() == Place(1, 0)


def test_the_newest_good_one_is_used(saved, said):
    for place in (Place(0, 4), Place(1, 0), Place(1, 1)):
        saved.save(place, state(0.0), {})
    newest = saved.root / Place(1, 1).name
    (newest / "manifest.json").unlink()
    assert saved.latest() == Place(1, 0)
    (line,) = said
    assert str(newest) in line and "cut off" in line
    assert not newest.exists()  # it will be written again


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "notes"])
def test_damage_is_named(saved, said, damage):
    saved.save(Place(0, 0), state(0.0), {})
    saved.save(Place(0, 2), state(1.0), {"sizes": 123})
    path = saved.root / Place(0, 2).name
    if damage == "manifest":
        (path / "manifest.json").write_text('{"files": {')
        expected = "manifest.json is damaged"
    elif damage == "notes":
        text = (path / "manifest.json").read_text()
        assert text.count('"sizes": 123') == 1
        text = text.replace('"sizes": 123', '"sizes": 124')
        (path / "manifest.json").write_text(text)
        expected = "manifest.json is damaged"
    else:
        files = [f for f in (path / "state").rglob("*") if f.is_file()]
        file = max(files, key=lambda f: f.stat().st_size)
        content = bytearray(file.read_bytes())
        if damage == "truncate":
            file.write_bytes(content[:-1])
        elif damage == "flip":
            content[7] ^= 1
            file.write_bytes(content)
        else:
            file.unlink()
        kind = "missing" if damage == "remove" else "altered"
        expected = f"{file.relative_to(path).as_posix()} {kind}"
    assert saved.latest() == Place(0, 0)
    assert str(path) in said[0] and expected in said[0]


def test_a_later_stage_needs_the_end_of_the_earlier_one(saved, said):
    for place in (Place(0, 3), Place(0, 4), Place(1, 0)):
        saved.save(place, state(0.0), {})
    (saved.root / Place(0, 4).name / "manifest.json").write_text("no")
    assert saved.latest() == Place(0, 3)
    assert "00-00000004: manifest.json is damaged; not used" in said[0]
    assert "01-00000000: a stage before it has no last checkpoint; not used" in said[1]
    assert [path.name for path in saved.root.iterdir()] == [Place(0, 3).name]


def test_nothing_saved_is_none(saved):
    assert saved.latest() is None


def test_another_shape_is_refused_by_name(saved):
    saved.save(Place(0, 0), state(0.0), {})
    wrong = {**state(0.0), "w": jnp.zeros((3, 3))}
    with pytest.raises(cj.core.errors.CheckpointError, match="new --workdir") as error:
        saved.restore(Place(0, 0), wrong)
    assert ": w: " in str(error.value)
    assert "holds float32[2, 3], the Model float32[3, 3]" in str(error.value)

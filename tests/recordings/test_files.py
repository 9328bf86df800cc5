"""The files: whole and untouched or refused, with hashes of the weights; a stand-in is never taken for real."""

import dataclasses
import hashlib

import pytest
from torch import nn

from rfsr_ext.recordings import PROTOCOLS, read_recording, record, recorded, say_missing, write_recording

ROWS = [{"a": "grass 1", "b": "grass 2", "same": True, "distance": 0.123456789}, {"distance": 2.0}]


@pytest.fixture
def vgg(monkeypatch, tmp_path):
    """A protocol that measures nothing on a network of one file, in an empty working folder."""
    weights = tmp_path / "weights" / "vgg.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    protocol = dataclasses.replace(
        PROTOCOLS["vgg19"],
        run=lambda network, device: ROWS,
        load=nn.Identity,
        files=lambda: {"vgg.pth": weights if weights.exists() else None},
    )
    monkeypatch.setitem(PROTOCOLS, "vgg19", protocol)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return weights


def written(vgg, path="recordings/vgg19.json", stand_in=False):
    write_recording(record("vgg19", nn.Identity(), {"vgg.pth": vgg}, stand_in), path)
    return read_recording(path)


def test_what_is_written_is_read(vgg):
    assert recorded("vgg19") is None
    recording = written(vgg)
    assert recorded("vgg19") == recorded("vgg19", "recordings") == recording
    assert recorded("vgg19", "elsewhere") is None
    assert recording.rows["distance"].tolist() == [0.123457, 2.0], "six digits"
    assert recording.data["weights"] == {"vgg.pth": hashlib.sha256(b"one").hexdigest()}
    for part in ("vgg19 (version 1)", "(cpu, float32)", "rfsr_ext ", "torch ", "; weights vgg.pth 7692c3ad"):
        assert part in recording.provenance
    assert "\n" not in recording.provenance and "STAND-IN" not in recording.provenance


def test_the_hash_follows_the_weights(vgg):
    before = written(vgg)
    vgg.write_bytes(b"two")
    assert written(vgg).data["weights"] != before.data["weights"]


def test_notebooks_find_it_from_their_folder(vgg, tmp_path, monkeypatch):
    recording = written(vgg)
    (tmp_path / "here" / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "notebooks")
    assert recorded("vgg19") == recording


def test_a_stand_in_is_never_shown_as_real(vgg):
    recording = written(vgg, stand_in=True)
    assert recording.stand_in and recording.provenance.startswith("STAND-IN, ")
    with pytest.raises(ValueError, match="must be a recording of the published vgg19, got one of a stand-in"):
        recorded("vgg19")


def test_another_protocols_file_is_refused(vgg, tmp_path):
    written(vgg, "recordings/clip-iqa.json")
    with pytest.raises(ValueError, match="must be a recording of the published clip-iqa, got one of vgg19"):
        recorded("clip-iqa")
    with pytest.raises(ValueError, match="protocol must be one of clip-iqa, "):
        recorded("magic")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-30], "no recording that can be used: .*; record it anew"),
        (lambda text: "[]", "it has not the fields of one"),
        (lambda text: text.replace('"seed": 0,\n', ""), "it has not the fields of one"),
        (lambda text: text.replace("0.123457", "0.023457"), "it was changed after it was written"),
        (lambda text: text.replace('"stand_in": true', '"stand_in": false'), "it was changed after it was written"),
        (lambda text: text.replace('"distance": 2.0', '"distance": NaN'), "not JSON compliant"),
    ],
)
def test_a_spoiled_file_is_refused(vgg, tmp_path, spoil, message):
    path = tmp_path / "spoiled.json"
    written(vgg, path, stand_in=True)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(ValueError, match=message):
        read_recording(path)


def test_another_version_is_refused(vgg, monkeypatch):
    written(vgg)
    monkeypatch.setitem(PROTOCOLS, "vgg19", dataclasses.replace(PROTOCOLS["vgg19"], version=2))
    with pytest.raises(ValueError, match="version must be 2 of protocol vgg19, got 1; record it anew"):
        recorded("vgg19")


def test_large_and_broken_results_are_not_written(vgg, monkeypatch, tmp_path):
    for rows, message in (([{"x": "y" * 20_000}], "at most 20000 bytes"), ([{"x": float("nan")}], "not JSON")):
        monkeypatch.setitem(PROTOCOLS, "vgg19", dataclasses.replace(PROTOCOLS["vgg19"], run=lambda n, d, r=rows: r))
        with pytest.raises(ValueError, match=message):
            written(vgg)
    assert not list(tmp_path.rglob("*.json"))


def test_that_there_is_none_is_one_line(capsys):
    say_missing("clip-iqa")
    assert capsys.readouterr().out == "no recording yet: rfsr record clip-iqa makes one\n"


def test_the_command_records_once(vgg, rfsr):
    code, printed = rfsr("record", "vgg19")
    assert code == 0 and printed.out.startswith("recordings/vgg19.json: 2 rows; vgg19 (version 1)")
    recording = recorded("vgg19")
    assert recording is not None and not recording.stand_in and list(recording.data["weights"]) == ["vgg.pth"]
    vgg.write_bytes(b"two")
    code, _ = rfsr("record", "vgg19")
    assert code == "rfsr: 'recordings/vgg19.json' exists already; give another --output or --overwrite"
    assert recorded("vgg19") == recording
    assert rfsr("record", "vgg19", "--overwrite")[0] == 0 and recorded("vgg19") != recording
    assert rfsr("record", "vgg19", "--output", "mine.json")[0] == 0 and read_recording("mine.json").data["rows"]
    lines = rfsr("record")[1].out.splitlines()
    assert next(line for line in lines if line.startswith("vgg19")).split()[:3] == ["vgg19", "yes", "here"]


def test_an_empty_machine(rfsr, no_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, printed = rfsr("record")
    assert code == 0 and all(f"\n{name} " in printed.out for name in PROTOCOLS)
    assert printed.out.count("  missing: ") == len(PROTOCOLS) and "vgg19-dcbb9e9d.pth" in printed.out
    for arguments, sentence in (
        (["vgg19"], "vgg19-dcbb9e9d.pth (VGG19 (ImageNet) of the Gram loss) is not in "),
        (["image-reward"], "ImageReward.pt (ImageReward) is not in "),
        (["seesr"], "seesr needs its published files; give their folder as weights"),
        (["magic"], "name must be one of clip-iqa, image-reward, vgg19, seesr, "),
        (["vgg19", "--weights", "x"], "--weights, --base and --dtype are for published models, got them for vgg19; "),
    ):
        code, _ = rfsr("record", *arguments)
        assert str(code).startswith(f"rfsr: {sentence}") and "\n" not in str(code)
    assert not list(tmp_path.glob("recordings*"))

"""Parts of a folder on disk: every weight is accounted for, in any precision."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from rfsr_ext.models.folders import open_part, open_plain_part
from rfsr_ext.weights.reading import open_network, read_tensors
from tests.tiny import tiny_parts

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae(tmp_path):
    part = tiny_parts()["vae"]
    part.save_pretrained(tmp_path / "vae")
    return part, tmp_path / "vae"


def test_half_precision_files_open_in_any_precision(vae, tmp_path):
    part, _ = vae
    halves = tmp_path / "halves"
    part.half().save_pretrained(halves, variant="fp16")
    assert [f.name for f in halves.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        opened = open_part(AutoencoderKL, halves, dtype)
        assert {p.dtype for p in opened.parameters()} == {dtype}
        for name, value in part.state_dict().items():
            assert torch.equal(opened.state_dict()[name], value.to(dtype))


def change(folder, file, how):
    tensors = load_file(folder / file)
    name = sorted(tensors)[0]
    if how == "lacks":
        del tensors[name]
    elif how == "extra":
        tensors["other.weight"] = torch.zeros(1)
    elif how == "shape":
        tensors[name] = torch.zeros(7, 7)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    if how == "truncated":
        (folder / file).write_bytes((folder / file).read_bytes()[:5000])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lacks", r"no AutoencoderKL of its config.json: it lacks 1 weights such as decoder\..* has no unknown ones"),
        ("extra", r"it lacks none and has 1 unknown ones such as other.weight"),
        ("shape", r"vae.*AutoencoderKL.*(shape|size)"),
        ("truncated", r"cannot be opened as AutoencoderKL .*damaged or of another model, fetch them again"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(vae, how, message):
    change(vae[1], WEIGHTS, how)
    with pytest.raises(ValueError, match=message) as error:
        open_part(AutoencoderKL, vae[1])
    assert "\n" not in str(error.value)


LACK = [MemoryError(), RuntimeError("Cannot allocate memory (os error 12)"), RuntimeError("can't start new thread")]


@pytest.mark.parametrize("reason", LACK)
@pytest.mark.parametrize("opened", [open_part, open_plain_part])
def test_too_little_memory_is_not_called_damage(tmp_path, opened, reason):
    class Kind:
        @staticmethod
        def from_pretrained(folder, **options):
            try:
                raise reason
            finally:  # as diffusers does
                raise OSError(f"Unable to load weights from checkpoint file for '{folder}'.")

    with pytest.raises(MemoryError, match="^not enough memory to open '.*'; close other programs, or raise the limit"):
        opened(Kind, tmp_path)


@pytest.mark.parametrize("reason", LACK)
def test_nor_is_a_weight_file_that_is_too_large(tmp_path, monkeypatch, reason):
    def load_file(path):
        raise reason

    monkeypatch.setattr("rfsr_ext.weights.reading.load_file", load_file)
    path = tmp_path / "x.safetensors"
    path.touch()
    with pytest.raises(MemoryError, match=f"^not enough memory to open '{path}'; close other programs, or raise"):
        read_tensors(path, "weights")


def test_text_encoders_are_as_strict(tmp_path):
    tiny_parts()["text_encoder"].save_pretrained(tmp_path / "text_encoder")
    assert open_part(CLIPTextModel, tmp_path / "text_encoder", torch.float16).dtype == torch.float16
    change(tmp_path / "text_encoder", "model.safetensors", "lacks")
    with pytest.raises(ValueError, match="it lacks 1 weights such as"):
        open_part(CLIPTextModel, tmp_path / "text_encoder")
    with pytest.raises(FileNotFoundError, match="unet folder '.*gone' does not exist; give a complete"):
        open_part(CLIPTextModel, tmp_path / "gone", name="unet")


# -- single files -----------------------------------------------------------------------------------------------------


def test_weights_are_taken_out_of_what_stands_beside_them(tmp_path):
    tensors = {"module.a": torch.rand(2, 3), "module.b": torch.rand(4)}
    torch.save({"epoch": 3, "global_step": 10, "state_dict": tensors, "hyper": {"lr": 1e-4}}, tmp_path / "x.ckpt")
    found = read_tensors(tmp_path / "x.ckpt", "checkpoint")
    assert found.keys() == {"a", "b"} and torch.equal(found["a"], tensors["module.a"])


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was run"), "w"))

    torch.save({"state_dict": {"a": torch.rand(2)}, "callback": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint '.*x.ckpt' cannot be read .*damaged or something else"):
        read_tensors(tmp_path / "x.ckpt", "checkpoint")
    assert not (tmp_path / "was run").exists()


def test_a_network_is_built_without_memory_of_its_own(tmp_path):
    built = []

    def build():
        built.append(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)))
        assert {p.device.type for p in built[0].parameters()} == {"meta"}
        return built[0]

    source = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
    opened = open_network(build, source.state_dict(), tmp_path / "x.pth", "a toy", torch.float32)
    assert opened is built[0] and not any(p.requires_grad for p in opened.parameters())
    for name, value in source.state_dict().items():
        assert torch.equal(opened.state_dict()[name].half() if value.is_floating_point() else value, value), name
    lacking = {name: value for name, value in source.state_dict().items() if name != "0.bias"}
    built.clear()
    with pytest.raises(ValueError, match=r"x.pth' is not a toy: it lacks 1 tensors such as 0.bias"):
        open_network(build, lacking, tmp_path / "x.pth", "a toy")

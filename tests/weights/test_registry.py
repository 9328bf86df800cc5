"""Weight files: found, verified, provided and fetched, with right, truncated, renamed and wrong ones; no network."""

import hashlib
import http.server
import re
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from rfsr_ext.weights import registry
from rfsr_ext.weights.registry import FILES, fetch, find, locate, missing, provide

CONTENT = bytes(range(256)) * 40
FILE = "vgg19-dcbb9e9d.pth"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Every place a file is looked for, empty, under ``tmp_path``."""
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("RFSR_WEIGHTS", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


@pytest.fixture
def known(monkeypatch):
    """As though ``CONTENT`` were the published VGG19 file."""
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(FILES, "vgg19", replace(FILES["vgg19"], sha256=digest[:8]))
    return digest


@pytest.fixture
def server(monkeypatch):
    """Serves what its ``answers`` says by path: bytes, and the length it claims."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in answers:
                return self.send_error(404)
            body, length = answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    answers = {}
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setitem(
        FILES, "vgg19", replace(FILES["vgg19"], source=f"http://127.0.0.1:{httpd.server_port}/vgg19.pth")
    )
    yield answers
    httpd.shutdown()
    httpd.server_close()


def test_every_entry_is_well_formed():
    for name, file in FILES.items():
        assert re.fullmatch(r"[a-z0-9+_.A-Z-]+", name) and file.purpose and "/" not in file.file
        assert re.fullmatch(r"([0-9a-f]{8}|[0-9a-f]{64})?", file.sha256), name
        assert file.source.startswith("https://") != (file.home == "hub"), name
        assert all(folder.is_absolute() for folder in file.places())
        assert file.home == "hub" or file.source.endswith(file.file)


def test_hashes_are_those_torchvision_and_openai_publish():
    from torchvision.models import AlexNet_Weights, VGG16_Weights, VGG19_Weights

    for name, published in (("vgg19", VGG19_Weights), ("vgg16", VGG16_Weights), ("alexnet", AlexNet_Weights)):
        weights = published.IMAGENET1K_V1
        assert FILES[name].source == weights.url and FILES[name].mib == weights.meta["_file_size"]
        assert torch.hub.HASH_REGEX.search(weights.url)[1] == FILES[name].sha256
    clip = pytest.importorskip("pyiqa.archs.clip_model", reason="pyiqa is not installed")
    for name, model in (("clip-rn50", "RN50"), ("clip-vit-l14", "ViT-L/14"), ("clip-vit-l14-aesthetic", "ViT-L/14")):
        assert FILES[name].source == clip._MODELS[model] and len(FILES[name].sha256) == 64


def test_the_right_file(places, known):
    path = places / "torch" / "hub" / "checkpoints" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert find("vgg19") == locate("vgg19") == path
    assert missing(["vgg19", "vgg16"]) == ["vgg16"]
    (places / "mine" / FILE).write_bytes(CONTENT)
    assert locate("vgg19") == places / "mine" / FILE  # the user's own folder comes first


def test_without_a_folder_of_the_users(places, known, monkeypatch):
    monkeypatch.delenv("RFSR_WEIGHTS")
    assert FILES["vgg19"].places() == [places / "torch" / "hub" / "checkpoints"]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:100], b"", b"another file altogether"])
def test_a_truncated_or_wrong_file(places, known, content):
    (places / "mine" / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{FILE}' is damaged or another file: .* must start with {known[:8]}, got"):
        locate("vgg19")


def test_a_file_that_changed_is_read_again(places, known):
    path = places / "mine" / FILE
    path.write_bytes(CONTENT)
    locate("vgg19")
    path.write_bytes(CONTENT[::-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        locate("vgg19")


def test_a_renamed_file(places, known):
    (places / "mine" / "vgg19.pth").write_bytes(CONTENT)
    sentence = (
        rf"{FILE} \(VGG19 \(ImageNet\) of the Gram loss\) is not in {places}/mine or "
        rf"{places}/torch/hub/checkpoints; with a network, `rfsr weights fetch vgg19` gets it from https://"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        locate("vgg19")


def test_an_unknown_name():
    with pytest.raises(ValueError, match="name must be one of vgg19, .*, got 'vgg18'"):
        locate("vgg18")


def test_provide_links_the_users_file_to_where_its_package_looks(places, known):
    own = places / "torch" / "hub" / "checkpoints" / FILE
    (places / "mine" / FILE).write_bytes(CONTENT)
    assert provide("vgg19") == own and own.is_symlink() and own.read_bytes() == CONTENT
    assert provide("vgg19") == own  # again
    (places / "mine").rename(places / "moved")
    (places / "other").mkdir()
    (places / "other" / FILE).write_bytes(CONTENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RFSR_WEIGHTS", str(places / "other"))
        assert provide("vgg19").resolve() == places / "other" / FILE  # a link that led nowhere is renewed


def test_provide_never_replaces_a_file(places, known):
    own = places / "torch" / "hub" / "checkpoints" / FILE
    own.parent.mkdir(parents=True)
    own.write_bytes(b"damaged")
    (places / "mine" / FILE).write_bytes(CONTENT)
    with pytest.raises(ValueError, match="torch/hub/checkpoints/.* is damaged"):
        provide("vgg19")
    assert own.read_bytes() == b"damaged"


def test_files_of_the_hub_are_found_in_its_cache(places):
    file = FILES["maniqa-vit"]
    (places / "mine" / file.file).write_bytes(b"some model.safetensors or other")
    assert find("maniqa-vit") is None
    snapshot = places / "hf" / f"models--{file.source.replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "snapshots" / "abc" / file.file).write_bytes(b"x")
    assert find("maniqa-vit") == provide("maniqa-vit") == snapshot / "snapshots" / "abc" / file.file
    assert file.folder() == snapshot


def test_fetch(places, known, server):
    server["/vgg19.pth"] = CONTENT, len(CONTENT)
    assert fetch("vgg19") == places / "mine" / FILE
    assert (places / "mine" / FILE).read_bytes() == CONTENT
    server.clear()
    assert fetch("vgg19") == places / "mine" / FILE  # it is there: nothing is asked for


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        (None, ConnectionError, "could not be downloaded from http://127.0.0.1.*404.*; download it where there is a n"),
        ((CONTENT[:999], len(CONTENT)), ValueError, "damaged or another file: invalid hash value"),
        ((CONTENT[::-1], len(CONTENT)), ValueError, "damaged or another file: invalid hash value"),
    ],
)
def test_a_fetch_that_fails_leaves_nothing(places, known, server, answer, kind, sentence):
    if answer:
        server["/vgg19.pth"] = answer
    with pytest.raises(kind, match=sentence):
        fetch("vgg19")
    assert list((places / "mine").iterdir()) == []


@pytest.fixture
def hub(monkeypatch):
    """A Hugging Face hub that has what its ``files`` say by path, and may break off after some bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self, body=b""):
            content = files.get(unquote(self.path))
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("X-Repo-Commit", "abc")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.do_HEAD(files.get(unquote(self.path), b"")[: files.get("breaks off after")])

        def log_message(self, *arguments):
            pass

    files = {}
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address := f"http://127.0.0.1:{httpd.server_port}")
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    yield files
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("name", ["musiq", "laion_aes", "image-reward"])
def test_fetch_from_the_hub(places, hub, name):
    hub[unquote(FILES[name].source.removeprefix("https://huggingface.co"))] = CONTENT
    assert fetch(name) == find(name) == places / "mine" / FILES[name].file
    assert fetch(name).read_bytes() == CONTENT
    assert list((places / "mine").iterdir()) == [places / "mine" / FILES[name].file]


def test_fetch_into_the_cache_of_the_hub(places, hub):
    hub[f"/{FILES['maniqa-vit'].source}/resolve/main/model.safetensors"] = CONTENT
    assert fetch("maniqa-vit") == find("maniqa-vit")
    assert find("maniqa-vit").read_bytes() == CONTENT and FILES["maniqa-vit"].folder() in find("maniqa-vit").parents


@pytest.mark.parametrize("name", ["musiq", "image-reward"])
@pytest.mark.parametrize("how", ["missing", "broken off"])
def test_a_fetch_from_the_hub_that_fails_leaves_nothing(places, hub, name, how):
    if how == "broken off":
        hub[unquote(FILES[name].source.removeprefix("https://huggingface.co"))] = CONTENT
        hub["breaks off after"] = 999
    with pytest.raises(
        ConnectionError, match=f"{FILES[name].file} could not be downloaded from https.*; download it"
    ) as e:
        fetch(name)
    assert "\n" not in str(e.value) and list((places / "mine").iterdir()) == []


@pytest.mark.parametrize("name", ["vgg19", "musiq", "maniqa-vit"])
def test_offline_is_one_sentence(places, monkeypatch, name):
    import socket

    def unreachable(*arguments, **options):
        raise OSError("Network is unreachable")

    for attribute in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, attribute, unreachable)
    with pytest.raises(ConnectionError, match=r"could not be downloaded from .*; download it where there i") as error:
        fetch(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if file.home == "pyiqa"])
def test_pyiqa_asks_for_the_very_files(name):
    """Each file name occurs in pyiqa's own sources: what is checked here is what it would download."""
    pyiqa = pytest.importorskip("pyiqa", reason="pyiqa is not installed")
    sources = "".join(path.read_text() for path in (Path(pyiqa.__file__).parent / "archs").glob("*_arch.py"))
    plain = unquote(FILES[name].file)
    assert f"'{plain}'" in sources
    assert registry._PYIQA == "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
    from pyiqa.archs.arch_util import get_url_from_name
    from pyiqa.utils.download_util import DEFAULT_CACHE_DIR

    address = get_url_from_name(plain).split("?")[0]
    assert address == FILES[name].source
    assert address.endswith("/" + FILES[name].file), "the name it is kept under"
    assert Path(DEFAULT_CACHE_DIR).name == "pyiqa"


@pytest.mark.parametrize(
    ("name", "model"),
    [("maniqa-vit", "vit_base_patch8_224"), ("nima-trunk", "inception_resnet_v2"), ("topiq-trunk", "resnet50")],
)
def test_timm_asks_for_the_very_repositories(name, model):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert timm.models.get_pretrained_cfg(model).hf_hub_id == FILES[name].source

"""Assets: there and back, tampering, atomic saving, fit of the parts."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from univla_jax import assets as assets_module
from univla_jax.assets import Assets, spec_key
from univla_jax.errors import UserError
from univla_jax.io import fingerprint, write_files
from univla_jax.normalization import ActionStatistics
from univla_jax.tokenizers.action import UniformBinTokenizer
from univla_jax.tokenizers.continuations import Continuations
from univla_jax.tokenizers.image import ImageSpec
from univla_jax.tokenizers.text import SentencePieceTextTokenizer
from univla_jax.tokenizers.vocabulary import Vocabulary


class TinyVision:
    """A vision tokenizer of four codes, one per 8 × 8 block, that counts how often it is read."""

    codebook_size = 4
    factor = 8
    loads = 0

    def __init__(self, weights: bytes = b"weights") -> None:
        self._files = {"params.safetensors": weights, "config.json": b"{}"}
        self.fingerprint = fingerprint(self._files)

    @classmethod
    def load(cls, folder):
        cls.loads += 1
        with open(f"{folder}/params.safetensors", "rb") as file:
            return cls(file.read())

    def encode_frames(self, frames):
        return (frames[:, ::8, ::8, 0] // 64).astype(np.uint16)

    def decode_codes(self, codes):
        return np.repeat(np.kron(codes, np.ones((8, 8)))[..., None], 3, -1).astype(np.uint8) * 64

    def save(self, folder):
        write_files(folder, self._files)


@pytest.fixture(autouse=True)
def tiny_vision(monkeypatch):
    monkeypatch.setattr(assets_module, "VisionTokenizer", TinyVision)
    monkeypatch.setattr(TinyVision, "loads", 0)


@pytest.fixture(scope="module")
def text():
    return SentencePieceTextTokenizer.fit(["pick up the red block"], 300, symbols=["1*8*8"])


@pytest.fixture
def assets(text):
    action = UniformBinTokenizer(16)
    row = (0.1, -1e-10)
    return Assets(
        vocabulary=Vocabulary.from_scratch(
            text.vocabulary_size, TinyVision.codebook_size, action.vocabulary_size
        ),
        text=text,
        vision=TinyVision(),
        action=action,
        image_specs={"image": ImageSpec(size=(80, 80)), "wrist": ImageSpec(size=None)},
        statistics={"tabletop": ActionStatistics(row, row, (-1.0, 0.0), (1 / 3, 1.0), 7)},
        task={"views": ["image", "wrist"], "frames": 2, "spacing": 0.1},
        model={"hidden_size": 64},
    )


@pytest.fixture
def folder(assets, tmp_path):
    assets.save(tmp_path / "assets")
    return tmp_path / "assets"


def test_there_and_back(assets, folder):
    again = Assets.load(folder)
    assert again.fingerprint == assets.fingerprint
    assert again.tokenizer_fingerprints == assets.tokenizer_fingerprints
    for name in ("vocabulary", "image_specs", "statistics", "task", "model"):
        assert getattr(again, name) == getattr(assets, name)
    assert again.text.encode("red block") == assets.text.encode("red block")
    assert again.action.encode([[0.5]]) == assets.action.encode([[0.5]])


def test_a_table_of_drafts_changes_nothing_else(assets, folder, tmp_path):
    known = Continuations.fit([np.array([1, 2, 3])])
    with_table = dataclasses.replace(assets, continuations=known)
    with_table.save(tmp_path / "with")
    again = Assets.load(tmp_path / "with")
    np.testing.assert_array_equal(again.continuations.table, known.table)
    assert again.fingerprint == assets.fingerprint and Assets.load(folder).continuations is None
    (tmp_path / "with" / "continuations.npy").unlink()
    with pytest.raises(UserError, match=r"continuations\.npy was removed"):
        Assets.load(tmp_path / "with")


def test_vision_weights_are_read_when_used(assets, folder):
    again = Assets.load(folder)
    again.save(folder.parent / "copy")
    assert TinyVision.loads == 0
    frames = np.full((1, 16, 8, 3), 130, np.uint8)
    assert again.vision.encode_frames(frames).tolist() == [[[2], [2]]]
    assert again.vision.decode_codes(np.array([[[2]]])).shape == (1, 8, 8, 3)
    assert TinyVision.loads == 1
    assert isinstance(again.vision.load(), TinyVision)
    assert isinstance(Assets.load(folder, lazy_vision=False).vision, TinyVision)
    assert Assets.load(folder.parent / "copy").fingerprint == assets.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "text/sentencepiece.model",
        "text/text_tokenizer.json",
        "vision/params.safetensors",
        "action/action_tokenizer.json",
    ],
)
def test_changed_and_removed_files_are_named(folder, name):
    path = folder / name
    original = path.read_bytes()
    path.write_bytes(original + b" ")
    with pytest.raises(UserError, match=rf"{name} was changed.*restore"):
        Assets.load(folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name} was removed.*restore"):
        Assets.load(folder)
    path.write_bytes(original)
    Assets.load(folder)


def test_extra_files_are_named(folder):
    (folder / "commit_success.txt").write_text("written by Orbax into each part")
    Assets.load(folder)
    (folder / "action" / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"action/processor_config\.json is not one of its files"):
        Assets.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["statistics"]["tabletop"]["q99"].__setitem__(0, 0.5), "was changed after"),
        (lambda r: r["statistics"].clear(), "was changed after"),
        (lambda r: r["layout"].update(frames=3), "was changed after"),
        (lambda r: r["image_specs"]["image"].update(filter="bilinear"), "was changed after"),
        (lambda r: r["vision"].update(fingerprint="0" * 64), "was changed after"),
        (lambda r: r.pop("statistics"), "statistics"),
        (lambda r: r.update(format=2), "format 2"),
        (lambda r: r["vocabulary"].update(text_size=299), "text tokenizer has"),
    ],
)
def test_edited_settings_are_refused(folder, change, words):
    path = folder / "assets.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=words):
        Assets.load(folder)


def test_missing_or_damaged_assets(folder, tmp_path):
    with pytest.raises(UserError, match=r"no file assets\.json"):
        Assets.load(tmp_path / "nowhere")
    (folder / "assets.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="not valid JSON"):
        Assets.load(folder)


def test_an_interrupted_save_leaves_nothing_that_looks_complete(assets, tmp_path, monkeypatch):
    def fail(_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(assets.action, "save", fail)
        with pytest.raises(OSError):
            assets.save(tmp_path / "assets")
    assert not (tmp_path / "assets").exists()
    assets.save(tmp_path / "assets")
    assert Assets.load(tmp_path / "assets").fingerprint == assets.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]


def test_saving_onto_a_folder(assets, folder, tmp_path):
    assets.save(folder)
    (tmp_path / "empty").mkdir()
    assets.save(tmp_path / "empty")
    assert Assets.load(tmp_path / "empty").fingerprint == assets.fingerprint
    other = dataclasses.replace(assets, task={"frames": 1})
    with pytest.raises(UserError, match="holds other files already"):
        other.save(folder)
    with pytest.raises(UserError, match="holds other files already"):
        assets.save(tmp_path)


def test_a_lazy_vision_tokenizer_needs_its_folder(folder, tmp_path):
    again = Assets.load(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="was removed"):
        again.save(tmp_path / "other")


def test_fingerprint_tells_every_part(assets):
    changed = [
        dataclasses.replace(assets, vision=TinyVision(b"other")),
        dataclasses.replace(assets, statistics={}),
        dataclasses.replace(assets, task={"frames": 1}),
        dataclasses.replace(assets, model={}),
        dataclasses.replace(assets, image_specs={}),
        dataclasses.replace(assets, action=None),
    ]
    assert len({assets.fingerprint, *(other.fingerprint for other in changed)}) == 7


def test_assets_without_vision_and_action(assets, tmp_path):
    bare = dataclasses.replace(assets, vision=None, action=None)
    bare.save(tmp_path / "bare")
    again = Assets.load(tmp_path / "bare")
    assert again.vision is None and again.action is None
    assert again.fingerprint == bare.fingerprint
    for name in ("vision", "action"):
        with pytest.raises(UserError, match=f"hold no {name} tokenizer"):
            again.require(name)
        assert assets.require(name) is getattr(assets, name)


def test_parts_must_fit_together(assets):
    vocabulary = assets.vocabulary
    sizes = (vocabulary.text_size, vocabulary.visual_size, vocabulary.action_size)
    for index, words in enumerate(["text tokenizer has", "vision tokenizer has", "17 codes"]):
        wrong = [size - (i == index) for i, size in enumerate(sizes)]
        with pytest.raises(UserError, match=words):
            dataclasses.replace(assets, vocabulary=Vocabulary.from_scratch(*wrong))
    with pytest.raises(UserError, match="factor 4"):
        dataclasses.replace(assets, image_specs={"image": ImageSpec(size=(80, 80), factor=4)})
    with pytest.raises(UserError, match="JSON values"):
        dataclasses.replace(assets, task={"size": {1, 2}}).fingerprint  # noqa: B018


def test_other_tokenizers_are_named_with_both_fingerprints(assets):
    prints = assets.tokenizer_fingerprints
    assets.require_same_tokenizers(prints, source="token store /store")
    assets.require_same_tokenizers({"vision": prints["vision"]}, source="token store /store")
    other = TinyVision(b"other").fingerprint
    with pytest.raises(UserError, match="token store /store") as caught:
        assets.require_same_tokenizers({"vision": other}, source="token store /store")
    assert other in str(caught.value) and prints["vision"] in str(caught.value)
    with pytest.raises(UserError, match="another vocabulary"):
        assets.require_same_tokenizers({"vocabulary": "0"}, source="checkpoint /run")


def test_other_image_specs_are_named(assets):
    large = ImageSpec(size=(128, 128))
    assets.require_same_image_specs("a", {"image": ImageSpec(size=(80, 80))}, source="store")
    with pytest.raises(UserError, match=r"view 'image'.*\(128, 128\).*\(80, 80\)"):
        assets.require_same_image_specs("a", {"image": large}, source="store")
    with pytest.raises(UserError, match=r"view 'side' of corpus 'a', only of image, wrist"):
        assets.require_same_image_specs("a", {"side": ImageSpec()}, source="store")


def test_a_view_may_have_a_spec_of_its_own_in_each_corpus(assets, tmp_path):
    large = ImageSpec(size=(128, 128))
    specs = {**assets.image_specs, spec_key("b", "image"): large}
    dataclasses.replace(assets, image_specs=specs).save(tmp_path / "assets")
    loaded = Assets.load(tmp_path / "assets")
    assert loaded.image_spec("a", "image") == assets.image_specs["image"]
    assert loaded.image_spec("b", "image") == large

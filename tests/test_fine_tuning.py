"Fine-tuning: what `init` starts from, what it refuses, and an experiment that goes on where it stopped."

import numpy as np
import pytest
import torch

from loftr_curriculum.geometry import Motion
from loftr_curriculum.io.files import read_json
from loftr_curriculum.model.config import MatcherConfig
from loftr_curriculum.model.matcher import Matcher
from loftr_curriculum.model.weights import PACKAGED, load_matcher, save_matcher
from loftr_curriculum.retina.config import EyeConfig
from loftr_curriculum.studies import fine_tuning as room
from loftr_curriculum.training.config import TrainConfig
from loftr_curriculum.training.module import PL_LoFTR
from loftr_curriculum.training.run import train

TINY = MatcherConfig(dims=(8, 16, 32), layers=1)
SETTINGS = room.Settings(
    cases=3,
    picture=128,
    eye=EyeConfig(size=256),
    worlds=1,
    report_worlds=2,
    motion=Motion(rotation_deg=10, scale=1.1, shift=0.2),
    size=64,
    pairs=4,
    epochs=1,
    pairs_per_epoch=4,
    batch=2,
)


@pytest.fixture
def weights(tmp_path):
    "A file of a matcher that is smaller than the default."
    torch.manual_seed(0)
    save_matcher(tmp_path / "tiny.safetensors", Matcher(TINY), {"pairs": 0})
    return tmp_path / "tiny.safetensors"


def test_a_run_starts_from_the_weights_with_their_configuration(weights):
    module = PL_LoFTR(TrainConfig(init=str(weights)))
    assert module.matcher.config == TINY and module.matcher.training
    assert module.hparams["matcher"]["dims"] == (8, 16, 32)
    for (name, a), b in zip(module.matcher.state_dict().items(), load_matcher(weights).state_dict().values()):
        assert torch.equal(a, b), name
    assert PL_LoFTR(TrainConfig(init=str(weights), matcher=TINY)).matcher.config == TINY


@pytest.mark.skipif(not PACKAGED.is_file(), reason="no packaged weights in this checkout")
def test_shipped_names_the_packaged_weights_and_a_file_of_that_name_goes_first(
    weights, tmp_path, monkeypatch
):
    packaged = load_matcher()
    module = PL_LoFTR(TrainConfig(init="shipped"))
    assert module.matcher.config == packaged.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.matcher.state_dict().values(), packaged.state_dict().values())
    )
    monkeypatch.chdir(tmp_path)
    torch.save(
        {
            "state_dict": {f"matcher.{k}": v for k, v in load_matcher(weights).state_dict().items()},
            "hyper_parameters": {"matcher": {"dims": (8, 16, 32), "layers": 1}},
        },
        "shipped",
    )
    assert load_matcher("shipped").config == TINY


def test_what_does_not_fit_is_refused_before_a_folder_is_made(weights, tmp_path):
    out = tmp_path / "run"
    for config, says in (
        (
            TrainConfig(out=str(out), init="packaged"),
            "packaged: no such weights file; expected .safetensors or .ckpt, or a name: shipped",
        ),
        (
            TrainConfig(out=str(out), init=str(weights), matcher=MatcherConfig(dims=(16, 48, 96), heads=3)),
            r"tiny.safetensors: holds a matcher with dims \(8, 16, 32\), heads 4; "
            "leave out --matcher.dims, --matcher.heads",
        ),
        (
            TrainConfig(out=str(out), init=str(weights), matcher=MatcherConfig("reference")),
            "holds the variant fast, train it with --matcher.variant fast",
        ),
    ):
        with pytest.raises((ValueError, OSError), match=says):
            train(config, progress=False)
        assert not out.exists()


def test_given_weights_go_on_gently_and_unguided(tmp_path):
    assert (TrainConfig().lr, TrainConfig().curriculum) == (1e-3, "v2.2")
    tuned = TrainConfig(init="shipped")
    assert tuned.lr == 1e-4 and (tuned.phases.vessel_soft_lambda, tuned.phases.vessel_loss_weight_scaler) == (
        0,
        1,
    )
    said = TrainConfig(init="shipped", lr=5e-4, curriculum="bias-only")
    assert (said.lr, said.curriculum) == (5e-4, "bias-only")


def test_the_camera_keeps_the_frame_and_never_shows_one_pattern_twice():
    rng, image = np.random.default_rng(0), np.zeros((128, 128), np.uint8)
    image[20:100, 30:110] = 120
    one, two = (room.new_camera(image, "fa", rng, room.Camera(noise=0, blur=0.1)) for _ in range(2))
    assert one.shape == image.shape and not one[image == 0].any() and one[image > 0].all()
    inside = (slice(30, 90), slice(40, 100))
    assert abs(np.corrcoef(one[inside].astype(float).ravel(), two[inside].astype(float).ravel())[0, 1]) < 0.98
    flat = room.Camera(noise=0, fibres=0, rim=0, blur=0.1, cast=(1, 1, 1))
    assert (
        room.new_camera(image, "cf", rng, flat)[60, 60] == 135
        and room.new_camera(image, "fa", rng, flat)[60, 60] == 120
    )


def test_the_tests_are_of_held_out_patients_and_report_eyes(tmp_path):
    s = SETTINGS
    triplets = room.make_domain(tmp_path, s)
    data = room.data_of(s, tmp_path, triplets, 1.0)
    tests = room.tests_of(data)
    trained = {
        item.case
        for source, _ in room.split_sources(data)[0]
        if hasattr(source, "items")
        for item in source.items
    }
    tested = {tests["new"].sample(k).id.partition(":")[0] for k in range(s.pairs)}
    assert tested and trained and not tested & trained
    assert {tests["old"].sample(k).id for k in range(s.pairs)} == {"eye1200000", "eye1200001"}


def test_an_interrupted_experiment_goes_on_and_other_weights_are_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("loftr_curriculum.model.weights.PACKAGED", weights)
    out, folder, whole = tmp_path / "out.json", tmp_path / "run", room.train
    calls = []

    def tired(config, **kw):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(config, **kw)

    monkeypatch.setattr(room, "train", tired)
    with pytest.raises(KeyboardInterrupt):
        room.run_fine_tuning(str(out), str(folder), SETTINGS)
    assert sorted(read_json(out)["errors"]) == ["alone", "before"]
    first = read_json(out)
    monkeypatch.setattr(room, "train", whole)
    result = room.run_fine_tuning(str(out), str(folder), SETTINGS)
    assert read_json(out)["errors"] == result["errors"] and sorted(result["errors"]) == [
        "alone",
        "before",
        "mixed",
    ]
    assert {k: result["errors"][k] for k in first["errors"]} == first["errors"] and result["runs"]["alone"][
        "steps"
    ] == 2
    assert (calls[0].init, calls[0].lr, calls[0].data.share_generated, calls[1].data.share_generated) == (
        "shipped",
        1e-4,
        0.0,
        1.0,
    )
    assert load_matcher(folder / "mixed" / "weights.safetensors").config == TINY
    torch.manual_seed(1)
    save_matcher(weights, Matcher(TINY))
    with pytest.raises(ValueError, match="made with other settings .weights is"):
        room.run_fine_tuning(str(out), str(folder), SETTINGS)

"""`python -m dtensor_ring verify`: models from a path, over processes; and its table as a value."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from test_families import FAMILIES
from test_verify import make_model, small_bert
from transformers.utils import logging

from dtensor_ring.__main__ import main
from dtensor_ring.integrations.verify import command as verify_command
from dtensor_ring.tools.verification import Difference, Judged, Row, Verification, VerificationError, first_culprit
from dtensor_ring.tools.verify_arguments import add_arguments


def options_of(*words: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser, int)
    return parser.parse_args(words)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FAMILIES["gemma2"]().to_dict()))
    return path


def command(*words: str):
    before = logging.get_verbosity()
    try:
        return verify_command._answer(options_of(*words))
    finally:
        logging.set_verbosity(before)


def test_the_command_verifies_a_model_of_its_first_layers(pools, config_file):
    words = ("--model", str(config_file), "--layers", "1", "--packed", "--layout", "zigzag/documents", "--length", "33", "--json")
    first, second = pools.run(2, command, *words)
    assert first == second
    facts = json.loads(first.text)
    assert first.ok is facts["ok"] is True, first.text
    assert facts["cp"] == 2
    assert "Zigzag(1, per_document=True) over 2 ranks" in facts["title"]
    assert "2 x 33 tokens in 5 documents" in facts["title"]
    assert {"name", "deviation", "tolerance", "verdict"} <= facts["rows"][0].keys()
    assert any(row["name"] == "layout of 1 attention modules" for row in facts["rows"])


def unlisted(*words: str):
    with patch("dtensor_ring.integrations.transformers.checks.MODEL_TYPES", ()):
        return command(*words), command(*words, "--unlisted")


def test_the_command_verifies_a_type_that_is_not_listed_if_told_so(pools, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FAMILIES["llama"]().to_dict()))
    for refusal, verified in pools.run(2, unlisted, "--model", str(path), "--layers", "1", "--no-edge-cases"):
        assert refusal.refused
        assert "unlisted=True" in refusal.text
        assert verified.ok, verified.text


def test_weights_of_a_folder_are_read(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = verify_command.load(options_of("--model", str(tmp_path), "--layers", "1", "--dtype", "float64"))
    assert loaded.dtype == torch.float64
    assert len(loaded.model.layers) == 1
    assert torch.equal(loaded.model.embed_tokens.weight.float(), model.model.embed_tokens.weight)
    random = verify_command.load(options_of("--model", str(tmp_path / "config.json"), "--seed", "3"))
    assert len(random.model.layers) == 2
    assert not torch.equal(random.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_config_of_an_encoder_gets_a_masked_head_and_what_is_no_config_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small_bert("MaskedLM").config.to_dict()))
    assert type(verify_command.load(options_of("--model", str(path), "--layers", "1"))).__name__ == "BertForMaskedLM"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json holds no JSON"):
        verify_command.load(options_of("--model", str(path)))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--model", "nowhere"], "nowhere: no such file or folder. Give a folder with a config.json"),
        (["--model", ".", "--cp", "0"], "--cp is at least 1, found 0"),
        (["--model", ".", "--layout", "zigzag/even"], "--layout zigzag/even has no placement"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(capsys, words, text):
    with pytest.raises(SystemExit) as ended:
        main(["verify", *words])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_starts_processes_of_its_own(config_file):
    words = [
        sys.executable,
        "-m",
        "dtensor_ring",
        "verify",
        "--model",
        str(config_file),
        "--cp",
        "2",
        "--layers",
        "2",
        "--no-edge-cases",
    ]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=280, check=True)
    assert ended.stdout.splitlines()[-1] == "the same as in one process"
    refusal = subprocess.run([*words[:-1], "--layers", "9"], capture_output=True, text=True, timeout=280, check=False)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert "--layers 9, but the model has 2" in refusal.stderr


def test_a_table_names_what_failed_and_every_value_can_be_json():
    difference = Difference("a.b", "B", "output", float("inf"), 1e-6, (1,), 3, 7, "what it was given agrees")
    found = Verification("T", (Row("loss", 0.5, 1e-6, "note"), Row("x", left_out="why"), Row("nan", float("nan"), 1)), difference)
    assert not found.ok
    assert [row.name for row in found.failed] == ["loss", "nan"]
    text = str(found)
    assert "FAIL  note" in text
    assert "a.b (B): its output parts by inf, tolerance 1.0e-06, rank 1, 3 tokens from 7 on; what it was given agrees" in text
    assert text.endswith("NOT the same as in one process: 2 rows")
    json.dumps(found.facts(), allow_nan=False)
    with pytest.raises(VerificationError, match="NOT the same"):
        found.raise_if_wrong()
    with pytest.raises(KeyError, match="no row 'logits'; there are loss"):
        found.row("logits")
    assert Verification("T", (Row("x", 1e-7, 1e-6),)).raise_if_wrong().ok


def test_a_module_is_blamed_where_it_was_given_what_is_right():
    classes = {"a": "A", "a.in": "In", "b": "B"}
    right = Judged("a.in", 0, 0.0, 1e-6)
    inner, outer, behind = (Judged(name, 0, 1.0, 1e-6, given) for name, given in (("a.in", 0.5), ("a", 0.0), ("b", 1.0)))
    assert first_culprit([right], classes) is None
    assert first_culprit([inner, outer, behind], classes).module == "a"
    assert first_culprit([right, behind], classes).note == "what it was given parts already"
    assert first_culprit([inner._replace(deviation=float("nan"))], classes).module == "a.in"

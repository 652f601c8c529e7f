"""Files for GLUE's and SQuAD's servers."""

import json

import pytest

from pipeline.evaluation.submission import GLUE_FILES, check_complete, write_glue, write_squad


def test_classes_keep_their_names_and_order(tmp_path):
    path = write_glue(tmp_path / "new", "QNLI", "pair", ["entailment", "not_entailment", "entailment"])
    assert path == tmp_path / "new/QNLI.tsv"
    assert path.read_bytes() == b"index\tprediction\n0\tentailment\n1\tnot_entailment\n2\tentailment\n"


def test_scores_have_three_decimals_and_those_of_stsb_its_range(tmp_path):
    predictions = [-0.2, 0.0004, 3.14159, 5.7, 5]
    path = write_glue(tmp_path, "STS-B", "regression", predictions)
    cells = [line.split("\t")[1] for line in path.read_text().splitlines()[1:]]
    assert cells == ["0.000", "0.000", "3.142", "5.000", "5.000"]
    own = write_glue(tmp_path, "own", "regression", predictions)
    assert own.read_text().splitlines()[1:] == ["0\t-0.200", "1\t0.000", "2\t3.142", "3\t5.700", "4\t5.000"]


@pytest.mark.parametrize("bad", ["two\twords", "line\n", ""])
def test_a_class_name_that_breaks_the_table_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="cannot stand in a table"):
        write_glue(tmp_path, "RTE", "pair", ["fine", bad])
    assert not list(tmp_path.iterdir())


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a score of nan was predicted"):
        write_glue(tmp_path, "STS-B", "regression", [1.0, float("nan")])
    assert not list(tmp_path.iterdir())


def test_all_eleven_files_are_asked_for(tmp_path):
    assert len(check_complete(tmp_path / "none")) == len(set(GLUE_FILES)) == 11
    for name in GLUE_FILES:
        if name not in ("AX", "MNLI-mm"):
            write_glue(tmp_path, name, "pair", ["0"])
    assert check_complete(tmp_path) == ["MNLI-mm.tsv", "AX.tsv"]


def test_answers_are_what_the_official_script_reads(tmp_path):
    predictions = {"q1": "é “x”", "q2": ""}
    path = write_squad(tmp_path / "new", "test", predictions)
    assert path == tmp_path / "new/test.json"
    assert json.loads(path.read_text(encoding="utf-8")) == predictions
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["test.json"]

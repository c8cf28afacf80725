"""CSV files: damaged ones are read as far as they can be, ones in another dialect not at all."""

import math

import pytest

from steps_to_target.reading.tables import column, read_csv

HEAD = "global_step,validation/wer\n"


def _read(tmp_path, data, **options):
    path = tmp_path / "log.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_csv(path, **options)


def _rows(table):
    return table.frame.to_numpy().tolist()


def test_plain_file(tmp_path):
    table = _read(tmp_path, HEAD + "1,2.5\n3,\n")
    assert table.columns == ("global_step", "validation/wer")
    assert table.frame["global_step"].tolist() == [1, 3]
    assert table.frame["validation/wer"].isna().tolist() == [False, True]
    assert (table.damaged, table.problem) == (0, "")


def test_numbers_keep_every_digit(tmp_path):
    written = ["0.28098000000000001", "1957.6390388011932", "5e-324", "0.1", "1e400"]
    table = _read(tmp_path, HEAD + "".join(f"1,{text}\n" for text in written))
    assert table.frame["validation/wer"].tolist() == [float(text) for text in written]


def test_missing_empty_and_header_only(tmp_path):
    assert read_csv(tmp_path / "none.csv").problem == "missing"
    assert _read(tmp_path, "").problem == "empty"
    assert _read(tmp_path, "\n\n").problem == "empty"
    assert _read(tmp_path, b"\0" * 4096).problem == "empty"
    table = _read(tmp_path, HEAD)
    assert (len(table.frame), table.problem) == (0, "")


def test_folder_in_place_of_a_file(tmp_path):
    table = read_csv(tmp_path)
    assert "cannot be read" in table.problem
    assert table.unreadable


@pytest.mark.parametrize("torn", ["3", "3,0.0"])
def test_half_written_last_line_is_left_out(tmp_path, torn):
    table = _read(tmp_path, HEAD + "1,1.2345678\n2,0.9876543\n" + torn)
    assert _rows(table) == [[1, 1.2345678], [2, 0.9876543]]
    assert table.damaged == 1


def test_whole_last_line_without_line_end_is_kept(tmp_path):
    assert len(_read(tmp_path, HEAD + "1,1.2345678\n2,0.9876543").frame) == 2


def test_words_nan_and_infinity(tmp_path):
    table = _read(tmp_path, "global_step,a,b,c\n1,nan,inf,hello\n")
    step, nan, infinity, word = _rows(table)[0]
    assert (step, infinity) == (1, math.inf)
    assert math.isnan(nan)
    assert math.isnan(word)
    assert table.problem == ""


def test_windows_line_ends_quotes_and_byte_order_mark(tmp_path):
    table = _read(tmp_path, b'\xef\xbb\xbfglobal_step,b\r\n"1","2"\r\n')
    assert _rows(table) == [[1, 2]]


def test_unbalanced_quote_costs_one_line_only(tmp_path):
    table = _read(tmp_path, HEAD + '1,2\n"3,4\n5,6\n')
    assert table.frame["global_step"].tolist() == [1, 5]
    assert table.damaged == 1


def test_header_repeated_in_the_middle_is_a_row_without_numbers(tmp_path):
    table = _read(tmp_path, HEAD + "1,0.5\n" + HEAD + "2,0.25\n")
    assert table.problem == ""
    assert table.frame["global_step"].dropna().tolist() == [1, 2]


def test_only_wanted_columns_are_read(tmp_path):
    table = _read(tmp_path, "global_step,a,b\n1,x,2\n", wanted=lambda name: name == "b")
    assert table.columns == ("global_step", "a", "b")
    assert list(table.frame) == ["b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("global_step;validation/wer\n1;0,5\n", "separated by semicolons"),
        ("global_step\tvalidation/wer\n1\t0.5\n", "separated by tabs"),
        ('global_step,validation/wer\n"1","0,5"\n"2","0,25"\n', "another notation ('0,5'"),
        ('global_step,validation/wer\n1,0.5\n"2,000",0.25\n', "another notation ('2,000'"),
        ("global_step,validation/wer\n1,0.5\n2'000,0.25\n", 'another notation ("2\'000"'),
        ('global_step,validation/wer\n1,0.5\n"1.234,5",0.2\n', "another notation ('1.234,5'"),
        ("global_step,validation/wer\n1,0,5\n2,0,25\n", "no line with as many cells"),
        ("step,wer\n1,0.5\n", "no column global_step"),
        ("global_step,validation/wer\n1,0.5\n".encode("utf-16"), "no column global_step"),
        (bytes(range(128, 256)) * 20, "no column global_step"),
        ('"' + "a" * 200_000 + '\n"' + "b" * 200_000, "no usable header"),
    ],
)
def test_another_dialect_is_unreadable_and_not_guessed_at(tmp_path, text, words):
    table = _read(tmp_path, text)
    assert table.unreadable
    assert words in table.problem
    assert table.frame.empty


def test_first_of_several_columns_with_gaps_filled(tmp_path):
    frame = _read(tmp_path, "global_step,a,b\n1,inf,2\n2,3,4\n").frame
    assert column(frame, "a", "b").tolist() == [2, 3]
    assert column(frame, "none").isna().all()

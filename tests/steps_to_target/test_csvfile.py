"""Damaged CSV files are read as far as they can be."""

import math

from steps_to_target.csvfile import TAIL_BYTES, read_csv


def _read(tmp_path, data, **options):
    path = tmp_path / "log.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_csv(path, **options)


def test_plain_file(tmp_path):
    table = _read(tmp_path, "a,b\n1,2.5\n3,\n")
    assert table.columns == ("a", "b")
    assert table.rows == [{"a": 1.0, "b": 2.5}, {"a": 3.0}]
    assert (table.damaged, table.problem) == (0, "")


def test_missing_empty_and_header_only(tmp_path):
    assert read_csv(tmp_path / "none.csv").problem == "missing"
    assert _read(tmp_path, "").problem == "empty"
    assert _read(tmp_path, "\n\n").problem == "empty"
    table = _read(tmp_path, "a,b\n")
    assert (table.rows, table.problem) == ([], "")


def test_folder_in_place_of_a_file(tmp_path):
    assert "cannot be read" in read_csv(tmp_path).problem


def test_half_written_last_line_is_left_out(tmp_path):
    table = _read(tmp_path, "a,b\n1,2.5\n3")
    assert table.rows == [{"a": 1.0, "b": 2.5}]
    assert table.damaged == 1


def test_last_number_cut_off_in_the_middle_is_left_out(tmp_path):
    table = _read(tmp_path, "step,validation/wer\n1,1.2345678\n2,0.9876543\n3,0.0")
    assert [row["step"] for row in table.rows] == [1.0, 2.0]
    assert table.damaged == 1


def test_whole_last_line_without_line_end_is_kept(tmp_path):
    table = _read(tmp_path, "step,validation/wer\n1,1.2345678\n2,0.9876543")
    assert len(table.rows) == 2


def test_words_nan_and_infinity(tmp_path):
    table = _read(tmp_path, "a,b,c\nnan,inf,hello\n")
    (row,) = table.rows
    assert math.isnan(row["a"])
    assert row["b"] == math.inf
    assert "c" not in row


def test_windows_line_ends_quotes_and_byte_order_mark(tmp_path):
    table = _read(tmp_path, b'\xef\xbb\xbfa,b\r\n"1","2"\r\n')
    assert table.rows == [{"a": 1.0, "b": 2.0}]


def test_unbalanced_quote_costs_one_line_only(tmp_path):
    table = _read(tmp_path, 'a,b\n1,2\n"3,4\n5,6\n')
    assert [row["a"] for row in table.rows] == [1.0, 5.0]
    assert table.damaged == 1


def test_header_that_cannot_be_parsed(tmp_path):
    table = _read(tmp_path, '"' + "a" * 200_000 + '\n"' + "b" * 200_000)
    assert (table.rows, table.problem) == ([], "has no usable header")


def test_tail_gives_the_last_rows_of_a_long_file(tmp_path):
    lines = "".join(f"{step},0.5\n" for step in range(20_000))
    table = _read(tmp_path, "step,loss\n" + lines, tail=True)
    assert not table.whole
    assert table.rows[-1] == {"step": 19_999.0, "loss": 0.5}
    assert 0 < len(table.rows) < TAIL_BYTES


def test_only_wanted_columns_are_read(tmp_path):
    table = _read(tmp_path, "a,b\n1,2\n", wanted=lambda name: name == "b")
    assert table.columns == ("a", "b")
    assert table.rows == [{"b": 2.0}]

from jaxlm.feedback.journal import FILE, Journal


def test_a_damaged_line_is_asked_anew_and_a_torn_one_cut_off(tmp_path):
    first = Journal(tmp_path)
    for key in "abc":
        first.put(0, key, key.upper())
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    for damaged in (lines[1][:9] + b"\x00\xff" + lines[1][9:], b'{"step": 0}\n', b"[1]\n"):
        (tmp_path / FILE).write_bytes(lines[0] + damaged + lines[2] + lines[0][:12])
        again = Journal(tmp_path)
        assert [again.get(0, key, lambda: "new") for key in "abc"] == ["A", "new", "C"]
        assert (tmp_path / FILE).read_bytes().startswith(lines[0] + damaged + lines[2])
        assert [Journal(tmp_path).get(0, key, lambda: "newer") for key in "abc"] == ["A", "new", "C"]

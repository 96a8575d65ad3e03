"""Tables that the commands print."""

from trl_sppo.tables import as_table


def test_a_table_is_plain_text_of_any_width():
    rows = [["[bold]x[/]", "0.5 [0.25, 0.75]"], ["y" * 150, "1"]]
    first, second, third = as_table(["judge", "win rate"], rows).splitlines()
    assert first == "judge" + " " * 155 + "win rate"  # 150, two spaces, and 16 of the widest cell to the right
    assert second == "[bold]x[/]" + " " * 142 + "0.5 [0.25, 0.75]"  # no markup
    assert third == "y" * 150 + " " * 17 + "1"


def test_wrapped_cells_lose_no_letter():
    rows = [["a b", "c" * 70 + " d" * 40], ["e", "f"]]
    lines = as_table(["x", "y"], rows, width=50).splitlines()
    assert max(map(len, lines)) <= 50 and all(line == line.rstrip() for line in lines)
    assert "".join(lines).count("c") == 70 and "".join(lines).count("d") == 40
    assert lines[-2:] == ["", "e    f"]

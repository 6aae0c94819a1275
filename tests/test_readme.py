import re

import pytest


def test_tables_are_those_of_their_files(script):
    readme = script("update_readme")
    for name in readme.READMES:
        text = (readme.ROOT / name).read_text()
        assert readme.TABLE.search(text)
        assert readme.updated(text) == text


def test_a_table_that_was_typed_is_replaced_and_one_part_can_be_taken(
    script, tmp_path, monkeypatch
):
    readme = script("update_readme")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    (tmp_path / "t.md").write_text("**top1**, seed 0\n\n| 0.9 |\n\n**top5**\n\n| 0.99 |\n")
    (tmp_path / "log.txt").write_text("4.00×\n")

    typed = (
        "<!-- table: t.md top1 -->\n| 1.0 |\n<!-- end -->\n<!-- table: log.txt -->\n<!-- end -->\n"
    )
    assert readme.updated(typed) == (
        "<!-- table: t.md top1 -->\n**top1**, seed 0\n\n| 0.9 |\n<!-- end -->\n"
        "<!-- table: log.txt -->\n```\n4.00×\n```\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match=r"t\.md: expected one part named 'top2', found 0"):
        readme.updated("<!-- table: t.md top2 -->\n<!-- end -->\n")


def test_links_and_named_files_exist(script):
    readme = script("update_readme")
    for name in readme.READMES:
        file = readme.ROOT / name
        text = file.read_text()
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (file.parent / link).exists(), link
        for path in re.findall(
            r"\b(?:accel|configs|scripts|results)/[\w/]+\.(?:py|json|log|txt|md)", text
        ):
            assert (readme.ROOT / path).exists(), path

from longtail_experts.tracking.identity import DECIDES_FIGURES, PACKAGE


def test_all_that_computes_is_part_of_the_code_an_expert_is_known_by():
    computes = {
        path
        for room in ("data", "learning")
        for path in (PACKAGE / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {path.suffix for path in computes} == {".py", ".cpp", ".h"}
    assert computes <= {path for pattern in DECIDES_FIGURES for path in PACKAGE.glob(pattern)}

from ao_core.testing import parametrize_scheme_checks


@parametrize_scheme_checks("ternary")
def test_conformance(check):
    check()

"""`expert_adapter` beside a linear layer for each expert, and beside all of it in two products."""


def test_expert_adapter(measured, case, way):
    measured(case, way)

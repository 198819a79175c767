"""Compare `expert_adapter` with a linear layer per expert, the composition of an adapter library, and two products by hand."""


def test_expert_adapter(measured, case, way):
    measured(case, way)

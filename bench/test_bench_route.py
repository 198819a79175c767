"""`route` and `importance_loss` together, beside the released code, which looks at the loss on the host, and the same without."""


def test_route(measured, case, way):
    measured(case, way)

"""Compare `route` plus `importance_loss` with the released code, with and without its read of the loss on the host."""


def test_route(measured, case, way):
    measured(case, way)

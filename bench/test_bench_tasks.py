"""Many tasks in one batch, beside a model for each of them."""


def test_tasks(measured, case, way):
    measured(case, way, stage="model")

"""Compare many tasks in one batch with one model per task."""


def test_tasks(measured, case, way):
    measured(case, way, stage="model")

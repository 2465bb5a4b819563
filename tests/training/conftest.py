from tests.training.toy_data import toy_data

__all__ = ["toy_data"]

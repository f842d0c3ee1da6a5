from tests.fixtures.kfp_api import kfp, kfp_teams

__all__ = ["kfp", "kfp_teams"]

# SPDX-License-Identifier: Apache-2.0
"""Workers send their counters only where a front end takes them away."""

from vllm_redrafter.engine.prometheus.receiver import METRICS_KEY, wants_metrics


def test_a_front_end_listens(engine_config):
    from vllm.v1.metrics.loggers import StatLoggerManager

    assert wants_metrics(engine_config())
    assert hasattr(StatLoggerManager.__init__, "__wrapped__")


def test_an_encoder_cache_connectors_statistics_are_its_own(engine_config):
    connector = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
    config = engine_config(ec_transfer_config=connector)
    assert config.ec_transfer_config is not None
    assert not wants_metrics(config) and METRICS_KEY not in config.additional_config


def test_a_front_end_that_knows_no_plugins(engine_config, monkeypatch):
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True, raising=False)
    assert not wants_metrics(engine_config())

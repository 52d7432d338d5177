from __future__ import annotations

import pytest

from meancache_trt.production.forecast import REMEMBERED, Forecast, Shape
from meancache_trt.shapes import PictureSize

SMALL = Shape(PictureSize(64, 64), text_tokens=32)
LARGE = Shape(PictureSize(128, 64), text_tokens=32)


def measured(*evaluations_ms: float, shape: Shape = SMALL) -> Forecast:
    forecast = Forecast()
    for evaluation_ms in evaluations_ms:
        forecast.note_loop(shape, evaluation_ms, preparation_ms=3.0)
        forecast.note_decoding(shape, 20.0)
    return forecast


def test_a_loop_takes_its_evaluations_times_one():
    forecast = measured(5.0)
    assert [forecast.times(SMALL, budget).loop for budget in (1, 6, 25)] == [5.0, 30.0, 125.0]
    assert forecast.times(SMALL, 6).total == 3.0 + 30.0 + 20.0


def test_a_few_disturbed_times_change_nothing():
    forecast = measured(*[5.0] * 8, *[90.0] * 7)
    assert forecast.times(SMALL, 1).loop == 5.0


def test_a_machine_that_became_slower_is_followed():
    forecast = measured(*[5.0] * 100, *[9.0] * (REMEMBERED // 2 + 1))
    assert forecast.times(SMALL, 1).loop == 9.0
    assert forecast.times(SMALL, 1, is_quickest=True).loop == 5.0


def test_an_unknown_shape_is_predicted_by_its_pixels_until_it_was_measured():
    forecast = measured(5.0)
    assert forecast.times(LARGE, 1).loop == 10.0
    assert forecast.times(Shape(SMALL.size, 32, batch=4), 1).loop == 20.0
    forecast.note_loop(LARGE, 7.0, preparation_ms=3.0)
    assert forecast.times(LARGE, 1).loop == 7.0


def test_the_nearest_text_length_stands_in_for_an_unknown_one():
    forecast = measured(5.0)
    forecast.note_loop(Shape(SMALL.size, text_tokens=8), 4.0, preparation_ms=3.0)
    assert forecast.times(Shape(SMALL.size, text_tokens=16), 1).loop == 4.0


def test_texts_in_a_cache_take_no_time_to_encode():
    forecast = Forecast()
    forecast.note_encoding(1, 40.0)
    assert forecast.encoding_ms(0) == 0.0
    assert forecast.encoding_ms(1) == forecast.encoding_ms(2) == 40.0


@pytest.mark.parametrize("budget", [1, 10])
def test_what_was_never_measured_is_not_guessed(budget):
    assert Forecast().times(SMALL, budget).total == 0.0

"""A page in headless Chromium, and what tests ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,1400",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

HOSTILE = '</script><img src=x onerror="window.hacked=1"><b>$x$</b>&lt;${1+1}'


class Browser:
    """A page in Chromium, and what the tests ask of it."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))

    def open(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": False}
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        self.driver.get(path.as_uri())
        self.wait(lambda: not self.find("#waiting"))

    def find(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector)[0].text)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def wait(self, holds: Callable[[], Any]) -> Any:
        end = time.monotonic() + 60
        while not (found := holds()):
            assert time.monotonic() < end, f"nothing came of it; the console says {self.driver.get_log('browser')}"
            time.sleep(0.05)
        return found

    def hover(self, role: int, layer: int, plot: str = "#heatmap") -> str:
        """Rest the mouse on a cell of a plot, of the heatmap's first model, and return what is said of it."""
        self.to_cell(role, layer, plot).perform()
        return str(self.wait(lambda: self.text(f"{plot} .hoverlayer")))

    def to_cell(self, role: int, layer: int, plot: str = "#heatmap") -> ActionChains:
        """Return the move of the mouse to a cell of a plot."""
        place = self.run(
            f"(() => {{ const it = document.querySelector({plot!r}); it.scrollIntoView({{ block: 'center' }});"
            " const box = it.getBoundingClientRect(), { xaxis: x, yaxis: y } = it._fullLayout;"
            f" return [x._offset + x.l2p({layer}) - box.width / 2, y._offset + y.l2p({role}) - box.height / 2]; }})()"
        )
        moves = ActionChains(self.driver, duration=50)
        return moves.move_to_element_with_offset(self.find(plot)[0], *map(int, place))

# Copyright © 2026 MLX Contributors

"""A real browser without a window, for the tests and figures of the page."""

import importlib.util
import os
import shutil

HAS_SELENIUM = importlib.util.find_spec("selenium") is not None
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
HAS_BROWSER = bool(HAS_SELENIUM and BROWSER and DRIVER)
WHY_NOT = "needs selenium, Chromium and chromedriver"


def open_browser():
    """Start Chromium; ``quit`` ends it."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    arguments = ["--headless=new", "--hide-scrollbars", "--disable-gpu"]
    # Containers have a small /dev/shm, and their root no sandbox.
    arguments += ["--disable-dev-shm-usage"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")
    for argument in arguments:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(DRIVER))


def look(driver, width=1280, height=860, scheme="light", scale=1, motion="reduce"):
    """Give the window a size, and the user preferences."""
    size = {"width": width, "height": height, "deviceScaleFactor": scale}
    size["mobile"] = width < 500
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": motion},
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

# Copyright © 2026 MLX Contributors

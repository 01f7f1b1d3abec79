"""What a jail's Python is started with; the runner itself is imported, so that its compiled form is used."""

import runner

runner.main()

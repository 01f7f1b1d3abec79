"""The method, pure and without torch: prompts, extraction, judgement, hints, reward, and the steps between records."""

"""Makes the secrets of a deployment: an ACL file, and for each user a file with its Redis URL.

`python ops/redis/make_secrets.py FOLDER [--address redis:6379] [--tls]`. The files are readable by
all and the folder by its owner alone: compose mounts each file by itself, for users that the host
does not know. A folder with files in it is left as it is; `--overwrite` gives everybody new
passwords. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("users.acl")
USERS = ("worker", "producer", "exporter")


def acl_file(template: str, passwords: dict[str, str]) -> str:
    """The file as Redis reads it: no comments, one line a user, digests for passwords."""
    lines: list[str] = []
    for line in template.splitlines():
        if line.startswith("user "):
            lines.append(line)
        elif line.startswith(" "):
            lines[-1] += " " + line.strip()
    digests = {user: hashlib.sha256(word.encode()).hexdigest() for user, word in passwords.items()}
    return "\n".join(lines).format(**digests) + "\n"


def secret_files(address: str, *, tls: bool) -> dict[str, str]:
    """Every file's name and content."""
    passwords = {user: secrets.token_urlsafe(32) for user in USERS}
    scheme = "rediss" if tls else "redis"
    files = {"users.acl": acl_file(TEMPLATE.read_text(encoding="utf-8"), passwords)}
    for user, password in passwords.items():
        files[f"{user}_redis_url"] = f"{scheme}://{user}:{password}@{address}/0\n"
    files["grafana_admin_password"] = secrets.token_urlsafe(24)
    return files


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address", default="redis:6379", help="HOST:PORT of the server")
    parser.add_argument("--tls", action="store_true", help="the server speaks TLS")
    parser.add_argument("--overwrite", action="store_true", help="new passwords for everybody")
    options = parser.parse_args()
    folder: Path = options.folder
    if folder.is_dir() and any(folder.iterdir()) and not options.overwrite:
        sys.exit(f"{folder} holds files already; --overwrite gives everybody new passwords")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, content in secret_files(options.address, tls=options.tls).items():
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_text(content, encoding="utf-8")
        path.chmod(0o444)
        print(path)


if __name__ == "__main__":
    main()

//! The catalog's tables, and the steps from one version of them to the next.

use rusqlite::{Connection, Transaction};

/// The version this program writes. SQLite's `user_version` holds the version of a file.
pub(crate) const VERSION: i64 = 4;

const STEPS: [&str; VERSION as usize] = ["
    CREATE TABLE hosts (
        id            BLOB PRIMARY KEY CHECK (length(id) = 16),
        name          TEXT NOT NULL,
        agent_version TEXT NOT NULL,
        seen_ns       INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE vms (
        id            INTEGER PRIMARY KEY,
        host          BLOB NOT NULL REFERENCES hosts (id),
        name          TEXT NOT NULL,
        uuid          BLOB,
        qemu_version  TEXT NOT NULL,
        seen_ns       INTEGER NOT NULL,
        UNIQUE (host, name)
    ) STRICT;
    CREATE TABLE disks (
        id            BLOB PRIMARY KEY CHECK (length(id) = 16),
        vm            INTEGER REFERENCES vms (id),  -- NULL: known from the store alone
        device        TEXT NOT NULL,
        node          TEXT NOT NULL,
        driver        TEXT NOT NULL,
        disk_bytes    INTEGER NOT NULL,
        read_only     INTEGER NOT NULL,
        seen_ns       INTEGER NOT NULL,             -- 0: never reported by an agent
        protect       INTEGER,                      -- 1 wanted, 0 not wanted, NULL: not known (a rebuilt catalog)
        epoch         INTEGER NOT NULL              -- last capture session handed out; never handed out again
    ) STRICT;
    CREATE INDEX disks_by_vm ON disks (vm);
", "
    ALTER TABLE disks ADD COLUMN policy TEXT NOT NULL DEFAULT 'track';
    ALTER TABLE disks ADD COLUMN throttle_ms INTEGER NOT NULL DEFAULT 1000;
    ALTER TABLE disks ADD COLUMN ring_mib INTEGER;            -- NULL: the agent's own default
    ALTER TABLE disks ADD COLUMN sync INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE disks ADD COLUMN sync_timeout_ms INTEGER NOT NULL DEFAULT 10000;
", "
    ALTER TABLE disks ADD COLUMN owner BLOB;                  -- host that has the disk; NULL: nobody, or not known
", "
    ALTER TABLE disks ADD COLUMN ended_epoch INTEGER NOT NULL DEFAULT 0;  -- last epoch of which it is known how it ended; 0: none
    ALTER TABLE disks ADD COLUMN ended INTEGER NOT NULL DEFAULT 1;        -- how: a number of GapReason
"];

/// Brings an open file to [`VERSION`]; `Err` carries what to do.
pub(crate) fn migrate(db: &mut Connection) -> Result<(), String> {
    let version: i64 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(|e| e.to_string())?;
    if version > VERSION {
        return Err(format!(
            "its version is {version}, this program knows {VERSION}; start a newer cdp-server"
        ));
    }
    let tx = db.transaction().map_err(|e| e.to_string())?;
    step(&tx, version).map_err(|e| format!("upgrading it from version {version} failed: {e}"))?;
    tx.commit().map_err(|e| e.to_string())
}

fn step(tx: &Transaction<'_>, version: i64) -> rusqlite::Result<()> {
    for sql in STEPS.iter().skip(usize::try_from(version).unwrap_or(0)) {
        tx.execute_batch(sql)?;
    }
    tx.pragma_update(None, "user_version", VERSION)
}

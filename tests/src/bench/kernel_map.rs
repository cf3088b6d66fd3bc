//! Finds the eBPF maps of an agent.

use std::fs;

use anyhow::{Context, Result};
use aya::maps::{MapData, MapInfo};

/// The maps with this name that a process has open. While an agent starts, it has more than one.
pub(super) fn open(pid: u32, name: &str) -> Result<Vec<MapData>> {
    let directory = format!("/proc/{pid}/fdinfo");
    let files =
        fs::read_dir(&directory).with_context(|| format!("read {directory}: has the agent ended?"))?;
    // Files may be closed meanwhile, and maps with them.
    let map = |file: fs::DirEntry| {
        let text = fs::read_to_string(file.path()).ok()?;
        let id = text.lines().find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok())?;
        let info = MapInfo::from_id(id).ok()?;
        (info.name_as_str() == Some(name)).then(|| MapData::from_id(id).ok())?
    };
    Ok(files.flatten().filter_map(map).collect())
}

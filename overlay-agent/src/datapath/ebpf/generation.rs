//! Generations of pinned maps: the maps of one set of programs, in a directory of their own. A set whose maps have another version or
//! shape than those that are pinned gets new ones beside them, so that programs of both can run until all links are switched.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{Map, MapData, MapInfo},
};
use tracing::{info, warn};

use super::pins::{Pins, make_directory};

/// A directory of pinned maps. Dropping it removes it, unless it was taken over or [`Generation::keep`] was called.
#[derive(Debug)]
pub(super) struct Generation {
    directory: PathBuf,
    is_kept: bool,
}

impl Generation {
    /// The directory whose maps `maps` have this agent's version and the shapes of those in `fresh`, a set that nothing else uses; a new
    /// one if there is none. Removes all directories while no link is pinned whose program could use their maps.
    pub(super) fn find(pins: &Pins, maps: &[&str], fresh: impl FnOnce() -> Result<Ebpf>) -> Result<Self> {
        let mut present = pins.generations()?;
        let own = |path: &PathBuf| version(path) == Some(pins.version());
        if present.iter().any(own) {
            let fresh = fresh()?;
            for directory in present.iter().filter(|path| own(path)) {
                match mismatch(directory, maps, &fresh)? {
                    None => return Ok(Self { directory: directory.clone(), is_kept: true }),
                    Some(why) => info!("maps are made beside those of an earlier agent: {why}"),
                }
            }
        } else if !present.is_empty() {
            info!("maps of version {} are made beside those of another version", pins.version());
        }
        if !pins.has_links() {
            for directory in std::mem::take(&mut present) {
                remove(&directory)?;
            }
        }
        let free = |path: &PathBuf| !present.contains(path);
        let directory =
            (1u32..).map(|number| pins.generation(number)).find(free).context("no name is free")?;
        make_directory(&directory)?;
        Ok(Self { directory, is_kept: false })
    }

    /// Where its maps are pinned.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether its maps may be in use.
    pub(super) fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Lets the directory stay.
    pub(super) fn keep(&mut self) {
        self.is_kept = true;
    }

    /// Gives it the name under which other processes look for the maps, after all others are removed.
    pub(super) fn become_first(&mut self, pins: &Pins) -> Result<()> {
        let first = pins.generation(1);
        if self.directory != first {
            fs::rename(&self.directory, &first)
                .with_context(|| format!("rename {} to {}", self.directory.display(), first.display()))?;
            self.directory = first;
        }
        Ok(())
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = remove(&self.directory)
        {
            warn!("{error:#}");
        }
    }
}

impl Pins {
    /// The directory for the maps of this agent's version. The first has no number in its name.
    fn generation(&self, number: u32) -> PathBuf {
        self.directory().join(match number {
            1 => format!("v{}", self.version()),
            number => format!("v{}-{number}", self.version()),
        })
    }

    /// All directories of maps, of any version.
    pub(super) fn generations(&self) -> Result<Vec<PathBuf>> {
        let context = || format!("list {}", self.directory().display());
        let entries = match fs::read_dir(self.directory()) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(context)?,
        };
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry.with_context(context)?;
            if entry.file_type().with_context(context)?.is_dir() && version(&entry.path()).is_some() {
                paths.push(entry.path());
            }
        }
        paths.sort();
        Ok(paths)
    }
}

/// Removes a directory of maps, which live as long as programs use them.
pub(super) fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// The version in the name of a directory of maps.
fn version(path: &Path) -> Option<u16> {
    let name = path.file_name()?.to_str()?.strip_prefix('v')?;
    name.split_once('-').map_or(name, |(version, _)| version).parse().ok()
}

/// Why a set cannot use the maps that are pinned in `directory`; `None` if it can.
fn mismatch(directory: &Path, maps: &[&str], fresh: &Ebpf) -> Result<Option<String>> {
    for map in maps {
        let made = fresh.map(map).with_context(|| format!("there is no map {map}"))?;
        let path = directory.join(map);
        // The process that made the directory was killed before it had made all.
        if !path.exists() {
            return Ok(Some(format!("{} is missing", path.display())));
        }
        if let Some(why) = difference(&path, made)? {
            return Ok(Some(format!("{}: {why}", path.display())));
        }
    }
    Ok(None)
}

/// Why the pinned map at `path` cannot take the place of `map`, which was just made; `None` if it can. Fails when there is none.
fn difference(path: &Path, map: &Map) -> Result<Option<String>> {
    let data: &MapData =
        map_data(map).with_context(|| format!("{}: a map of an unknown type", path.display()))?;
    let wanted = data.info()?;
    let pinned =
        MapInfo::from_pin(path).with_context(|| format!("open the pinned map {}", path.display()))?;
    let shape = |info: &MapInfo| {
        anyhow::Ok((
            info.map_type()?,
            info.key_size(),
            info.value_size(),
            info.max_entries(),
            info.map_flags(),
        ))
    };
    let (wanted, pinned) = (shape(&wanted)?, shape(&pinned)?);
    Ok((wanted != pinned).then(|| format!("it is {pinned:?} instead of {wanted:?}")))
}

/// The kernel's map behind a value of the library.
fn map_data(map: &Map) -> Option<&MapData> {
    if let Map::Array(data)
    | Map::HashMap(data)
    | Map::LpmTrie(data)
    | Map::LruHashMap(data)
    | Map::PerCpuArray(data)
    | Map::SkStorage(data) = map
    {
        return Some(data);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_maps_name_their_version() {
        let of = |name: &str| version(&Path::new("/sys/fs/bpf/overlay-agent/ovl0:4026531840").join(name));
        assert_eq!([of("v6"), of("v7-2"), of("v65535")], [Some(6), Some(7), Some(65535)]);
        for name in ["ovl_xdp:2", "v", "v-2", "vx", "6", "v65536"] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}

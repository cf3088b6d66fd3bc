//! Makes this host ask the node's DNS server: `/etc/resolv.conf`, and back.
//!
//! The file's first line says that the agent wrote it, and has a checksum of the rest. The original is beside it, behind a first line
//! of its own, until [`ResolvConf::restore`] puts it back: at the end, or after a crash at the next start or by `down`. A file that
//! another program has changed since is not touched.

use std::{
    fs, io,
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, SocketAddrV6},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use tempfile::NamedTempFile;

/// The file of the C library.
pub const PATH: &str = "/etc/resolv.conf";
/// The first line of a file that the agent wrote is this and the checksum of the rest.
const MARKER: &str = "# Written by overlay-agent, which restores the original when it ends. Checksum ";
/// The first line of the original.
const ORIGINAL: &str = "# The original of resolv.conf, kept by overlay-agent. It follows this line.\n";
/// The same when there was no file.
const NO_ORIGINAL: &str = "# There was no resolv.conf before overlay-agent wrote one.\n";
/// Appended to the name of the file for that of the original.
const BACKUP_SUFFIX: &str = ".before-overlay-agent";
/// The C library reads no more servers.
const MAX_SERVERS: usize = 3;
/// The C library reads no more of the search list (since glibc 2.26 it does).
const MAX_SEARCH: usize = 6;
/// With at least two dots, a name is asked as it is first: public names such as `www.example.com`. With fewer, such as `web.shop`,
/// below the search list first, so that no public domain takes the place of a service.
const NDOTS: u8 = 2;
/// Most symbolic links on the way to a file, as in the kernel.
const MOST_LINKS: usize = 40;
/// Largest file that is read, in bytes.
const LARGEST: u64 = 1 << 20;
/// Mode of a file that did not exist.
const MODE: u32 = 0o644;
/// Port of DNS.
const DNS_PORT: u16 = 53;

/// The file, and the original beside it.
#[derive(Clone, Debug)]
pub struct ResolvConf {
    /// Where the symbolic links end: they stay as they are.
    target: PathBuf,
    backup: PathBuf,
}

/// What the agent's file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// The node's DNS server. The file has no port: it listens at 53.
    pub nameserver: IpAddr,
    /// Domains in which names are looked for, in front of those of the original.
    pub search: Vec<String>,
}

/// The original.
#[derive(Debug, PartialEq, Eq)]
enum Original {
    File(Vec<u8>),
    NoFile,
}

/// Whose the file is.
#[derive(Debug, PartialEq, Eq)]
enum State {
    Missing,
    Ours,
    /// The agent's first line, but another program has changed the rest.
    Changed,
    Foreign(Vec<u8>),
}

impl ResolvConf {
    /// The file at `path`, or what that links to. Fails when links lead in a circle.
    pub fn at(path: &Path) -> Result<Self> {
        let target = end_of_links(path)?;
        let mut backup = target.clone().into_os_string();
        backup.push(BACKUP_SUFFIX);
        Ok(Self { target, backup: backup.into() })
    }

    /// Writes the file, and keeps the original beside it. Options and search domains of the original stay. Returns whether something was
    /// written. Fails when another program has changed the agent's file, or has written its own while the original is still there.
    pub fn install(&self, content: &Content) -> Result<bool> {
        let original = match (self.state()?, self.original()?) {
            (State::Ours, Some(original)) => original,
            (State::Ours, None) => bail!(self.lost()),
            (State::Missing, None | Some(Original::NoFile)) => self.keep(Original::NoFile)?,
            (State::Foreign(bytes), None) => self.keep(Original::File(bytes))?,
            // The agent ended between the two steps.
            (State::Foreign(bytes), Some(Original::File(kept))) if bytes == kept => Original::File(kept),
            (State::Changed, _) | (State::Missing | State::Foreign(_), Some(_)) => bail!(self.changed()),
        };
        let bytes = match &original {
            Original::File(bytes) => bytes.as_slice(),
            Original::NoFile => &[],
        };
        let text = content.text(&String::from_utf8_lossy(bytes));
        if self.read(&self.target)?.as_deref() == Some(text.as_bytes()) {
            return Ok(false);
        }
        self.replace(&self.target, text.as_bytes(), &self.target)?;
        Ok(true)
    }

    /// Puts the original back. Returns whether there was something to do. Fails when another program has changed the file since: it
    /// stays as it is, and so does the original beside it.
    pub fn restore(&self) -> Result<bool> {
        let Some(original) = self.original()? else {
            return match self.state()? {
                State::Ours | State::Changed => bail!(self.lost()),
                State::Missing | State::Foreign(_) => Ok(false),
            };
        };
        match (self.state()?, &original) {
            (State::Ours, Original::File(bytes)) => self.replace(&self.target, bytes, &self.target)?,
            (State::Ours, Original::NoFile) => self.remove(&self.target)?,
            // The agent ended between the two steps.
            (State::Foreign(now), Original::File(bytes)) if now == *bytes => {}
            (State::Missing, Original::NoFile) => {}
            (State::Missing | State::Changed | State::Foreign(_), _) => bail!(self.changed()),
        }
        self.remove(&self.backup)?;
        Ok(true)
    }

    /// The servers that the original names, for names that are not of services. `own` are the addresses of the node's DNS server, which
    /// is never its own upstream.
    pub fn upstreams(&self, own: &[SocketAddr]) -> Result<Vec<SocketAddr>> {
        let bytes = match (self.state()?, self.original()?) {
            (State::Foreign(bytes), _) | (State::Ours | State::Changed, Some(Original::File(bytes))) => bytes,
            (State::Missing | State::Ours | State::Changed, _) => Vec::new(),
        };
        let text = String::from_utf8_lossy(&bytes);
        let servers = text.lines().filter_map(|line| server(keyword(line, "nameserver")?)).take(MAX_SERVERS);
        Ok(servers.filter(|server| !own.contains(server)).collect())
    }

    fn state(&self) -> Result<State> {
        let Some(bytes) = self.read(&self.target)? else { return Ok(State::Missing) };
        let Some(rest) = bytes.strip_prefix(MARKER.as_bytes()) else { return Ok(State::Foreign(bytes)) };
        let mut parts = rest.splitn(2, |byte| *byte == b'\n');
        let (sum, body) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        Ok(if checksum(body).as_bytes() == sum { State::Ours } else { State::Changed })
    }

    fn original(&self) -> Result<Option<Original>> {
        let Some(bytes) = self.read(&self.backup)? else { return Ok(None) };
        if bytes == NO_ORIGINAL.as_bytes() {
            return Ok(Some(Original::NoFile));
        }
        match bytes.strip_prefix(ORIGINAL.as_bytes()) {
            Some(rest) => Ok(Some(Original::File(rest.to_vec()))),
            None => bail!("{} is not the agent's: move it away", self.backup.display()),
        }
    }

    fn keep(&self, original: Original) -> Result<Original> {
        let bytes = match &original {
            Original::File(bytes) => [ORIGINAL.as_bytes(), bytes].concat(),
            Original::NoFile => NO_ORIGINAL.as_bytes().to_vec(),
        };
        self.replace(&self.backup, &bytes, &self.target)?;
        Ok(original)
    }

    fn changed(&self) -> String {
        let (target, backup) = (self.target.display(), self.backup.display());
        format!(
            "another program has changed {target} since the agent wrote it, so it stays as it is: make it right, and remove {backup}, \
             which has the original"
        )
    }

    fn lost(&self) -> String {
        let (target, backup) = (self.target.display(), self.backup.display());
        format!(
            "the agent wrote {target}, but the original is no longer in {backup}: write {target} yourself"
        )
    }

    fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            fs::File::open(path)?.take(LARGEST + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) if bytes.len() as u64 > LARGEST => {
                bail!("{} is larger than {LARGEST} bytes", path.display())
            }
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// Writes a file in one step, with the mode and the owner of `like`. A file on which another one is mounted, as container runtimes
    /// do, cannot be replaced, and is written in place.
    fn replace(&self, path: &Path, bytes: &[u8], like: &Path) -> Result<()> {
        let attempt = || -> io::Result<()> {
            let directory =
                path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut file = NamedTempFile::new_in(directory)?;
            file.write_all(bytes)?;
            match fs::metadata(like) {
                Ok(metadata) => {
                    let _ = std::os::unix::fs::chown(file.path(), Some(metadata.uid()), Some(metadata.gid()));
                    file.as_file().set_permissions(metadata.permissions())?;
                }
                Err(_) => file.as_file().set_permissions(fs::Permissions::from_mode(MODE))?,
            }
            file.as_file().sync_all()?;
            match file.persist(path) {
                Ok(_) => Ok(()),
                Err(error) if error.error.kind() == ErrorKind::ResourceBusy => in_place(path, bytes),
                Err(error) => Err(error.error),
            }
        };
        attempt().with_context(|| format!("write {}", path.display()))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))
    }
}

fn in_place(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

impl Content {
    /// The file for an original.
    fn text(&self, original: &str) -> String {
        let mut search = self.search.clone();
        // The last of `search` and `domain` counts, and `domain` is a list of one.
        let list = |line| keyword(line, "search").or_else(|| keyword(line, "domain"));
        let before = original.lines().filter_map(list).next_back().unwrap_or_default();
        for domain in before.split_ascii_whitespace() {
            if !search.iter().any(|own| own.eq_ignore_ascii_case(domain)) {
                search.push(domain.to_owned());
            }
        }
        search.truncate(MAX_SEARCH);
        let mut body = format!("nameserver {}\n", self.nameserver);
        if !search.is_empty() {
            body += &format!("search {}\n", search.join(" "));
        }
        body += &format!("options ndots:{NDOTS}\n");
        // Of an option that is set twice, the last one counts: those of the original, but for smaller numbers of dots.
        for line in original.lines() {
            let options = keyword(line, "options").unwrap_or_default().split_ascii_whitespace();
            let kept: Vec<&str> = options.filter(|option| !is_fewer_dots(option)).collect();
            if !kept.is_empty() {
                body += &format!("options {}\n", kept.join(" "));
            }
            if keyword(line, "sortlist").is_some() {
                body += &format!("{line}\n");
            }
        }
        format!("{MARKER}{}\n{body}", checksum(body.as_bytes()))
    }
}

fn is_fewer_dots(option: &str) -> bool {
    let dots = option.strip_prefix("ndots:").and_then(|dots| dots.parse::<u8>().ok());
    dots.is_some_and(|dots| dots < NDOTS)
}

/// The rest of a line that begins with a keyword and a blank.
fn keyword<'a>(line: &'a str, keyword: &str) -> Option<&'a str> {
    let rest = line.strip_prefix(keyword)?;
    rest.starts_with([' ', '\t']).then(|| rest.trim())
}

/// The server of a `nameserver` line: an address, of IPv6 with or without the number of a device.
fn server(text: &str) -> Option<SocketAddr> {
    let text = text.split_ascii_whitespace().next()?;
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some((address, DNS_PORT).into());
    }
    let (address, device) = text.split_once('%')?;
    let device = device.parse().or_else(|_| nix::net::if_::if_nametoindex(device)).ok()?;
    Some(SocketAddrV6::new(address.parse().ok()?, DNS_PORT, 0, device).into())
}

/// FNV-1a, 64 bits, in hexadecimal: it tells a changed file, by accident, not by intent.
fn checksum(bytes: &[u8]) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", bytes.iter().fold(0xcbf2_9ce4_8422_2325, step))
}

/// Follows symbolic links, also to a path where there is nothing.
fn end_of_links(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(next) = fs::read_link(&path) else { return Ok(path) };
        path = path.parent().unwrap_or(Path::new("/")).join(next);
    }
    bail!("the symbolic links of {} do not end", path.display())
}

#[cfg(test)]
#[path = "resolv_conf_tests.rs"]
mod tests;

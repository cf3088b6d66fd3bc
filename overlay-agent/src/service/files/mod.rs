//! Services from files of this node: a directory of YAML or JSON files, whose services this agent writes to the store, and whose
//! endpoints it keeps there under this node's lifetime.
//!
//! A service belongs to the network, so it has no lifetime. What this agent wrote is remembered in a state file: a service whose file
//! is gone is removed, also when the file went while no agent ran, but only while its record is still what this agent wrote. So
//! nodes with the same files agree, and what an operator or another node has written since is neither replaced nor removed.
//!
//! A file that cannot be used changes nothing: what it brought before stays in force.

mod own_endpoints;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, info};

use super::{
    health::VerdictReceiver,
    input::{self, LONGEST_INPUT, ServiceInput},
    name::{EndpointName, ServiceName},
    record::{Endpoint, Endpoints, Service, Services},
};
use crate::{
    store::{DirectoryWatch, Kind as _, OwnState, Record, Store, Writable as _},
    whole_file,
};

/// How long the end waits for writes: the store may be away.
const LAST_WRITES: Duration = Duration::from_secs(1);
/// Pause before another attempt after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// Names of files that are read end so. Others, and those that begin with a dot, belong to editors and other tools.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// Where the files are, and what is done with them.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The directory of the files. It need not exist yet.
    pub directory: PathBuf,
    /// Where this agent remembers the services that it wrote.
    pub state_file: PathBuf,
    /// This node's name, in the names of its endpoints: a DNS label.
    pub node: String,
}

/// What came of the files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FilesState {
    /// Services that the files have and the store, too.
    pub services: usize,
    /// Files and services that are left out, each with the reason.
    pub skipped: BTreeMap<String, String>,
    /// Why the files cannot be read or the store cannot be written.
    pub problem: Option<String>,
}

/// A task that keeps the services of the files in the store. Dropped, it ends, and its endpoints end with their lifetime.
#[derive(Debug)]
pub struct ServiceFiles {
    /// What came of the files.
    pub state: watch::Receiver<FilesState>,
    /// What came of this node's endpoints.
    pub endpoints: watch::Receiver<OwnState>,
    /// The endpoints of the files.
    pub named: watch::Receiver<Arc<NamedEndpoints>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl ServiceFiles {
    /// Stops, and removes the endpoints of this node. Services stay.
    pub async fn stop(self) {
        let Self { stop, task, .. } = self;
        drop(stop);
        // It fails only when the runtime ends it.
        let _ = task.await;
    }
}

/// Endpoints by their names.
pub type NamedEndpoints = BTreeMap<EndpointName, Endpoint>;

/// Keeps the services of files in a task, and their endpoints in the states of the verdicts.
pub fn keep(store: &Store, options: FileOptions, verdicts: VerdictReceiver) -> ServiceFiles {
    let own = store.keep_own::<Endpoints>();
    let (names, named) = watch::channel(Arc::default());
    let (sender, state) = watch::channel(FilesState::default());
    let (stop, stopped) = oneshot::channel::<()>();
    let (idle, is_idle) = watch::channel(true);
    let endpoints = own.state.clone();
    let mut keeper = Keeper {
        store: store.clone(),
        options: Arc::new(options),
        state: sender,
        named: names,
        idle,
        files: BTreeMap::new(),
        brought: None,
        saved: Brought::new(),
    };
    let wanted = named.clone();
    let task = tokio::spawn(async move {
        tokio::select! {
            () = keeper.run() => {}
            () = own_endpoints::keep(&own, wanted, verdicts) => {}
            () = stopped_between_writes(stopped, is_idle) => {}
        }
        own.stop().await;
    });
    ServiceFiles { state, endpoints, named, stop, task }
}

/// Waits for the end, and then for what is being written: a service must not be in the store without being remembered.
async fn stopped_between_writes(stopped: oneshot::Receiver<()>, mut is_idle: watch::Receiver<bool>) {
    // Both errors are the end of the other side.
    let _ = stopped.await;
    let _ = timeout(LAST_WRITES, is_idle.wait_for(|is_idle| *is_idle)).await;
}

/// The services of a file.
type Content = BTreeMap<ServiceName, ServiceInput>;
/// Services that this agent wrote, as it wrote them.
type Brought = BTreeMap<ServiceName, Written>;

/// The text of a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Written(String);

impl Written {
    fn is(&self, record: &Record<Services>) -> bool {
        Services::parse_value(self.0.as_bytes()).is_ok_and(|service| record.value.as_ref() == Ok(&service))
    }
}

struct Keeper {
    store: Store,
    options: Arc<FileOptions>,
    state: watch::Sender<FilesState>,
    named: watch::Sender<Arc<NamedEndpoints>>,
    /// Whether nothing is being written.
    idle: watch::Sender<bool>,
    /// Files by their names, as they were when they could be used last.
    files: BTreeMap<String, Content>,
    /// `None` before the state file was read.
    brought: Option<Brought>,
    /// What the state file has.
    saved: Brought,
}

impl Keeper {
    /// Never returns.
    async fn run(&mut self) {
        loop {
            if let Err(error) = self.watch().await {
                debug!("{error:#}");
                let before = self.state.borrow().clone();
                self.report(FilesState { problem: Some(format!("{error:#}")), ..before });
            }
            sleep(RETRY).await;
        }
    }

    /// Watches before it reads, so that no change is missed. Looks at the store at times, too.
    async fn watch(&mut self) -> Result<()> {
        let mut watch = DirectoryWatch::new(self.options.directory.clone())?;
        loop {
            self.idle.send_replace(false);
            let done = self.reconcile().await;
            self.idle.send_replace(true);
            done?;
            watch.changed().await?;
        }
    }

    fn report(&self, state: FilesState) {
        self.state.send_if_modified(|before| {
            let changed = *before != state;
            *before = state;
            changed
        });
    }

    async fn reconcile(&mut self) -> Result<()> {
        let options = Arc::clone(&self.options);
        let read = tokio::task::spawn_blocking(move || {
            Ok::<_, anyhow::Error>((read_files(&options.directory)?, read_state(&options.state_file)))
        });
        let (texts, remembered) = read.await??;
        let mut brought = match self.brought.take() {
            Some(brought) => brought,
            None => {
                self.saved = remembered?;
                self.saved.clone()
            }
        };
        let mut skipped = BTreeMap::new();
        let wanted = merge(&mut self.files, texts, &mut skipped);
        let mut endpoints = NamedEndpoints::new();
        for (name, input) in &wanted.services {
            match input.endpoints_on(name, &self.options.node) {
                Ok(named) => endpoints.extend(named),
                Err(error) => drop(skipped.insert(name.to_string(), error.to_string())),
            }
        }
        self.named.send_if_modified(|named| {
            let changed = **named != endpoints;
            *named = Arc::new(endpoints);
            changed
        });
        let written = write(&self.store, &wanted, &mut brought, &mut skipped).await;
        // Also after a failure: some were written.
        let saved = if brought == self.saved { Ok(()) } else { self.save(&brought).await };
        if saved.is_ok() {
            self.saved.clone_from(&brought);
        }
        self.brought = Some(brought);
        self.report(FilesState { services: written?, skipped, problem: None });
        saved
    }

    async fn save(&self, brought: &Brought) -> Result<()> {
        let (text, path) = (serde_json::to_string(brought)?, self.options.state_file.clone());
        tokio::task::spawn_blocking(move || write_state(&path, &text)).await?
    }
}

/// What the files say.
struct Wanted {
    services: Content,
    /// Whether the files have more, or had it, which cannot be read: then no service may be removed.
    is_partial: bool,
}

/// Merges the files. `known` are the files as they were when they could be used last; a file that cannot be used now counts as it was.
fn merge(
    known: &mut BTreeMap<String, Content>,
    texts: BTreeMap<String, Result<String, String>>,
    skipped: &mut BTreeMap<String, String>,
) -> Wanted {
    known.retain(|file, _| texts.contains_key(file));
    let mut wanted = Wanted { services: Content::new(), is_partial: false };
    for (file, text) in texts {
        match text.and_then(|text| input::parse(&text).map_err(|error| error.to_string())) {
            Ok(content) => drop(known.insert(file, content)),
            Err(why) => {
                wanted.is_partial |= !known.contains_key(&file);
                skipped.insert(file, why);
            }
        }
    }
    for (file, content) in &*known {
        if let Some(name) = content.keys().find(|name| wanted.services.contains_key(*name)) {
            let why = format!("another file before it has the service {name}, too");
            skipped.entry(file.clone()).or_insert(why);
            wanted.is_partial = true;
            continue;
        }
        wanted.services.extend(content.clone());
    }
    wanted
}

/// Makes the store's services those that are wanted. Returns the number of those that it has.
async fn write(
    store: &Store,
    wanted: &Wanted,
    brought: &mut Brought,
    skipped: &mut BTreeMap<String, String>,
) -> Result<usize> {
    store.prepare::<Services>().await?;
    let stored: Vec<Record<Services>> = store.list().await?;
    let stored: BTreeMap<_, _> =
        stored.iter().filter_map(|record| Some((record.id.as_ref().ok()?, record))).collect();
    let mut count = 0;
    for (name, ServiceInput { service, .. }) in &wanted.services {
        match write_one(store, name, service, stored.get(name).copied(), brought.get(name)).await? {
            Ok(()) => {
                brought.insert(name.clone(), Written(Services::text(service)));
                count += 1;
            }
            Err(why) => drop(skipped.insert(name.to_string(), why)),
        }
    }
    if wanted.is_partial {
        return Ok(count);
    }
    let gone: BTreeSet<_> =
        brought.keys().filter(|name| !wanted.services.contains_key(*name)).cloned().collect();
    for name in gone {
        if let (Some(record), Some(written)) = (stored.get(&name), brought.get(&name))
            && written.is(record)
            && store.remove(record).await?
        {
            info!("the service {name} was removed: its file is gone");
        }
        brought.remove(&name);
    }
    Ok(count)
}

/// Writes a service unless it is there. The inner error is the reason why the record stays as it is.
async fn write_one(
    store: &Store,
    name: &ServiceName,
    service: &Service,
    stored: Option<&Record<Services>>,
    brought: Option<&Written>,
) -> Result<Result<(), String>> {
    let written = match stored {
        Some(record) if record.value.as_ref() == Ok(service) => return Ok(Ok(())),
        Some(record) if brought.is_some_and(|written| written.is(record)) => {
            store.replace_record::<Services>(name, record.version, service, None, &[]).await?
        }
        Some(_) => {
            return Ok(Err(format!(
                "an operator or another node wrote {name} otherwise: make the file the same, or remove that record with \
                 `overlay-agent service remove {name}`"
            )));
        }
        None => store.create_record::<Services>(name, service, None, &[]).await?,
    };
    match written {
        Some(_) => {
            info!("the service {name} was written from its file");
            Ok(Ok(()))
        }
        None => Ok(Err(format!("another client wrote {name} at the same time"))),
    }
}

/// The texts of the files by their names; instead of one that cannot be read, the reason.
fn read_files(directory: &Path) -> Result<BTreeMap<String, Result<String, String>>> {
    let list = || -> std::io::Result<_> {
        let mut texts = BTreeMap::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            if !name.starts_with('.') && EXTENSIONS.contains(&extension) {
                texts.insert(name, read_file(&path).map_err(|error| format!("{error:#}")));
            }
        }
        Ok(texts)
    };
    list().with_context(|| format!("list {}", directory.display()))
}

fn read_file(path: &Path) -> Result<String> {
    // A FIFO would wait for its writer.
    if !path.metadata()?.is_file() {
        bail!("it is no regular file");
    }
    let mut text = String::new();
    File::open(path)?.take(LONGEST_INPUT + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LONGEST_INPUT {
        bail!("it is longer than {} KiB", LONGEST_INPUT / 1024);
    }
    Ok(text)
}

fn read_state(path: &Path) -> Result<Brought> {
    match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str(&text).with_context(|| {
            format!("read {}: remove it, and services whose files are gone stay", path.display())
        }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Brought::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// Writes the file whole or not at all.
fn write_state(path: &Path, text: &str) -> Result<()> {
    whole_file::replace(path, |file| file.write_all(text.as_bytes()))
        .with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests;
